-- Human names of images, as their labels and annotations state them.
CREATE TABLE image_names (
    manifest TEXT NOT NULL PRIMARY KEY CHECK (length(manifest) = 64),  -- digest of the manifest
    fleet TEXT NOT NULL,
    service TEXT NOT NULL,
    "release" TEXT NOT NULL,
    "commit" TEXT NOT NULL,
    last INTEGER NOT NULL  -- when it was last recorded, seconds UTC
) STRICT, WITHOUT ROWID;
CREATE INDEX image_names_by_last ON image_names (last);
