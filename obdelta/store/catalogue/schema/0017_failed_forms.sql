-- A delta may be too large in one form and not in another: '' counts for every form, as do verdicts
-- that were recorded earlier.
CREATE TABLE failures_by_form (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    form TEXT NOT NULL CHECK (form IN ('', 'gzip', 'zstd')),
    outcome TEXT NOT NULL CHECK (outcome IN ('not worth', 'proof failed', 'unusable', 'error')),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    base_repository TEXT NOT NULL DEFAULT '',
    target_repository TEXT NOT NULL DEFAULT '',
    recipe INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, base, target, form)
) STRICT, WITHOUT ROWID;
INSERT INTO failures_by_form
    SELECT kind, base, target, '', outcome, reason, count, last, base_repository, target_repository,
        recipe
    FROM failures;
DROP TABLE failures;
ALTER TABLE failures_by_form RENAME TO failures;
CREATE INDEX failures_by_last ON failures (last);

-- A build makes the form that its client reads. Earlier, a start resumed the best one.
CREATE TABLE queued_builds_by_form (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target_repository TEXT NOT NULL,
    target TEXT NOT NULL CHECK (length(target) = 64),
    form TEXT NOT NULL CHECK (form IN ('gzip', 'zstd')),  -- the first one that it makes
    since INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0,                 -- how often a start resumed it
    UNIQUE (kind, base, target, form)
) STRICT;
INSERT INTO queued_builds_by_form
    SELECT kind, base_repository, base, target_repository, target,
        CASE kind WHEN 'v3' THEN 'zstd' ELSE 'gzip' END, since, starts
    FROM queued_builds ORDER BY since, rowid;
DROP TABLE queued_builds;
ALTER TABLE queued_builds_by_form RENAME TO queued_builds;
