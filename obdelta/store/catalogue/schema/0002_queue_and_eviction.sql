-- Builds that are queued or running. A row is deleted when its build ends.
-- Rows that a start finds belong to interrupted builds.
CREATE TABLE queued_builds (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target_repository TEXT NOT NULL,
    target TEXT NOT NULL CHECK (length(target) = 64),
    since INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0,                 -- how often a start resumed it
    UNIQUE (kind, base, target)
) STRICT;

-- 1: the file was evicted for the quota and is rebuilt on request.
ALTER TABLE blobs ADD COLUMN evicted INTEGER NOT NULL DEFAULT 0 CHECK (evicted IN (0, 1));
CREATE INDEX blobs_by_eviction ON blobs (evicted, size);
