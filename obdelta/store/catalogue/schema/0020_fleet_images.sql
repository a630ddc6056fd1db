-- Images of releases, as openBalena's API named them. A row stays when the release is gone: then
-- its deltas may go, too.
CREATE TABLE fleet_images (
    location TEXT NOT NULL PRIMARY KEY,  -- the API's name of the image, with the registry's host
    repository TEXT NOT NULL,
    manifest TEXT NOT NULL CHECK (length(manifest) IN (0, 64)),  -- "": the API knows no digest
    application INTEGER NOT NULL,  -- the API's ID of the fleet
    fleet TEXT NOT NULL,
    service TEXT NOT NULL,
    "release" TEXT NOT NULL,
    "commit" TEXT NOT NULL,
    last INTEGER NOT NULL  -- when it was last recorded, seconds UTC
) STRICT, WITHOUT ROWID;
CREATE INDEX fleet_images_by_manifest ON fleet_images (manifest);
CREATE INDEX fleet_images_by_repository ON fleet_images (repository);
CREATE INDEX fleet_images_by_last ON fleet_images (last);
