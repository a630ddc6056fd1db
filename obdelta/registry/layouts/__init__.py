"""An upstream that is a directory of OCI image layouts."""
