-- The same view, starting from the manifest: CROSS JOIN keeps SQLite from reading every blob for
-- each delta.
DROP VIEW layers_here;
CREATE VIEW layers_here AS
    SELECT manifest_blobs.manifest AS manifest, blobs.digest AS blob, blobs.size AS size
    FROM manifest_blobs CROSS JOIN blobs ON blobs.digest = manifest_blobs.blob
    WHERE blobs.evicted = 0 AND blobs.size > 4096
        AND manifest_blobs.media_type != 'application/vnd.docker.container.image.v1+json';
