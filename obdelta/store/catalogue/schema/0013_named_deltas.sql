-- Delta tags given to clients, and the two images of each. A row outlives the delta itself.
CREATE TABLE named_deltas (
    target_repository TEXT NOT NULL,
    tag TEXT NOT NULL,
    base_repository TEXT NOT NULL,                     -- the same contents may lie in several
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target TEXT NOT NULL CHECK (length(target) = 64),  -- digest of the target image's manifest
    last INTEGER NOT NULL,                             -- when it was last given, seconds UTC
    PRIMARY KEY (target_repository, tag, base_repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX named_deltas_by_last ON named_deltas (last);
