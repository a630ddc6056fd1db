-- Failures that do not depend on the contents (upstream errors, a missing blob) belong to one pair
-- of repositories, and do not apply to others with the same contents.
-- Verdicts on contents stay in `failures`.
CREATE TABLE repository_failures (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    base_repository TEXT NOT NULL,
    target_repository TEXT NOT NULL,
    recipe INTEGER NOT NULL,
    PRIMARY KEY (kind, base, target, base_repository, target_repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX repository_failures_by_last ON repository_failures (last);
INSERT INTO repository_failures
    SELECT kind, base, target, reason, count, last, base_repository, target_repository, recipe
    FROM failures WHERE outcome = 'error';
DELETE FROM failures WHERE outcome = 'error';
