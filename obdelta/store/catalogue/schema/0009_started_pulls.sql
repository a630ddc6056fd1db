-- Manifests of deltas that valid tokens fetched. Their blobs may be fetched for some time after
-- expiry.
-- Tokens and subjects are sha256 hashes, until is in seconds UTC.
CREATE TABLE started_pulls (
    token TEXT NOT NULL,
    manifest TEXT NOT NULL CHECK (length(manifest) = 64),
    repository TEXT NOT NULL,
    subject TEXT NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (token, manifest, repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX started_pulls_by_subject ON started_pulls (subject, until);
CREATE INDEX started_pulls_by_until ON started_pulls (until);
