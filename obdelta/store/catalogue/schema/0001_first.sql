-- Digests and diff_ids are 64 hex digits; times are whole seconds UTC; sizes are bytes.

CREATE TABLE deltas (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    recipe INTEGER NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target TEXT NOT NULL CHECK (length(target) = 64),  -- digest of the target image's manifest
    base_repository TEXT NOT NULL,                     -- the first one; publications has all
    target_repository TEXT NOT NULL,
    tag TEXT UNIQUE,                                   -- v3: its tag in each target repository
    -- v3: digest of the delta image's manifest; v2: of the batch
    content TEXT NOT NULL CHECK (length(content) = 64),
    full_bytes INTEGER NOT NULL,
    delta_bytes INTEGER NOT NULL,
    seconds REAL NOT NULL,
    created INTEGER NOT NULL,
    last_served INTEGER NOT NULL,                      -- created, until it is served
    served INTEGER NOT NULL,
    details TEXT NOT NULL,                             -- JSON
    UNIQUE (kind, recipe, base, target),
    CHECK ((kind = 'v3') = (tag IS NOT NULL))
) STRICT;
CREATE INDEX deltas_by_content ON deltas (content);
CREATE INDEX deltas_by_last_served ON deltas (last_served);
CREATE INDEX deltas_by_created ON deltas (created);

-- The same two images may lie in several repositories.
-- Each pair of repositories here was requested and permitted.
CREATE TABLE publications (
    delta INTEGER NOT NULL REFERENCES deltas (id) ON DELETE CASCADE,
    target_repository TEXT NOT NULL,
    base_repository TEXT NOT NULL,
    PRIMARY KEY (delta, target_repository, base_repository)
) STRICT, WITHOUT ROWID;

CREATE TABLE manifests (
    digest TEXT PRIMARY KEY NOT NULL CHECK (length(digest) = 64),
    media_type TEXT NOT NULL,
    raw BLOB NOT NULL
) STRICT;

-- Files in the blob store that deltas need.
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY NOT NULL CHECK (length(digest) = 64),
    size INTEGER NOT NULL CHECK (size >= 0)
) STRICT, WITHOUT ROWID;

CREATE TABLE manifest_blobs (
    manifest TEXT NOT NULL REFERENCES manifests (digest) ON DELETE CASCADE,
    blob TEXT NOT NULL REFERENCES blobs (digest),
    media_type TEXT NOT NULL,
    PRIMARY KEY (manifest, blob)
) STRICT, WITHOUT ROWID;
CREATE INDEX manifest_blobs_by_blob ON manifest_blobs (blob);

CREATE TABLE failures (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    outcome TEXT NOT NULL CHECK (outcome IN ('not worth', 'proof failed', 'error')),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    PRIMARY KEY (kind, base, target)
) STRICT, WITHOUT ROWID;
CREATE INDEX failures_by_last ON failures (last);

-- What each blob inflates to: the only link from an image to the layer cache.
CREATE TABLE layers (
    blob TEXT PRIMARY KEY NOT NULL CHECK (length(blob) = 64),
    blob_size INTEGER NOT NULL,
    diff_id TEXT NOT NULL CHECK (length(diff_id) = 64),
    size INTEGER NOT NULL,
    media_type TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE counters (
    name TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
