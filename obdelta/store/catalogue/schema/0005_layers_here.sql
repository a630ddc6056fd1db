-- Of delta images, what is here and worth giving up: not configs, and not what takes no more than a block of the disk.
CREATE VIEW layers_here AS
    SELECT manifest_blobs.manifest AS manifest, blobs.digest AS blob, blobs.size AS size
    FROM manifest_blobs JOIN blobs ON blobs.digest = manifest_blobs.blob
    WHERE blobs.evicted = 0 AND blobs.size > 4096
        AND manifest_blobs.media_type != 'application/vnd.docker.container.image.v1+json';
