"""An upstream that is a folder of OCI image layouts."""
