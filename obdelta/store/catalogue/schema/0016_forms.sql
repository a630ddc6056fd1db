-- A pair may have a delta in each form. Those built earlier are gzip, as are v2 batches.
-- SQLite cannot change a UNIQUE constraint, so both tables are copied. Dropping `deltas` deletes
-- what refers to it, so `publications` goes first.
CREATE TABLE deltas_by_form (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    recipe INTEGER NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target TEXT NOT NULL CHECK (length(target) = 64),  -- digest of the target image's manifest
    form TEXT NOT NULL DEFAULT 'gzip' CHECK (form IN ('gzip', 'zstd')),
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
    UNIQUE (kind, recipe, base, target, form),
    CHECK ((kind = 'v3') = (tag IS NOT NULL)),
    CHECK (kind = 'v3' OR form = 'gzip')
) STRICT;
CREATE TABLE publications_by_form (
    delta INTEGER NOT NULL REFERENCES deltas_by_form (id) ON DELETE CASCADE,
    target_repository TEXT NOT NULL,
    base_repository TEXT NOT NULL,
    PRIMARY KEY (delta, target_repository, base_repository)
) STRICT, WITHOUT ROWID;
INSERT INTO deltas_by_form
    SELECT id, kind, recipe, base, target, 'gzip', base_repository, target_repository, tag, content,
        full_bytes, delta_bytes, seconds, created, last_served, served, details
    FROM deltas;
INSERT INTO publications_by_form SELECT * FROM publications;
DROP TABLE publications;
DROP TABLE deltas;
ALTER TABLE deltas_by_form RENAME TO deltas;
ALTER TABLE publications_by_form RENAME TO publications;
CREATE INDEX deltas_by_content ON deltas (content);
CREATE INDEX deltas_by_last_served ON deltas (last_served);
CREATE INDEX deltas_by_created ON deltas (created);

-- Configs have a media type for each form.
DROP VIEW layers_here;
CREATE VIEW layers_here AS
    SELECT manifest_blobs.manifest AS manifest, blobs.digest AS blob, blobs.size AS size
    FROM manifest_blobs CROSS JOIN blobs ON blobs.digest = manifest_blobs.blob
    WHERE blobs.evicted = 0 AND blobs.size > 4096
        AND manifest_blobs.media_type NOT IN (
            'application/vnd.docker.container.image.v1+json',
            'application/vnd.oci.image.config.v1+json');
