-- Builds that wait or run. A row goes when its build has ended; what a start finds was cut off.
CREATE TABLE queued_builds (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target_repository TEXT NOT NULL,
    target TEXT NOT NULL CHECK (length(target) = 64),
    since INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0,                 -- how often a start of the process has taken it up
    UNIQUE (kind, base, target)
) STRICT;

-- 1: the file was given up for the quota; it is made again when somebody asks for it.
ALTER TABLE blobs ADD COLUMN evicted INTEGER NOT NULL DEFAULT 0 CHECK (evicted IN (0, 1));
CREATE INDEX blobs_by_eviction ON blobs (evicted, size);
