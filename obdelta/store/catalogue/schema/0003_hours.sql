-- Deltas served in each hour, for the operators' plot.
-- hour is the time in seconds divided by 3600.

CREATE TABLE hours (
    hour INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    deltas INTEGER NOT NULL,
    full_bytes INTEGER NOT NULL,
    delta_bytes INTEGER NOT NULL,
    PRIMARY KEY (hour, kind)
) STRICT, WITHOUT ROWID;
