-- One more outcome: 'unusable', for images that never allow a delta.

CREATE TABLE failures_with_unusable (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    outcome TEXT NOT NULL CHECK (outcome IN ('not worth', 'proof failed', 'unusable', 'error')),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    base_repository TEXT NOT NULL DEFAULT '',
    target_repository TEXT NOT NULL DEFAULT '',
    recipe INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, base, target)
) STRICT, WITHOUT ROWID;
INSERT INTO failures_with_unusable SELECT * FROM failures;
DROP TABLE failures;
ALTER TABLE failures_with_unusable RENAME TO failures;
CREATE INDEX failures_by_last ON failures (last);
