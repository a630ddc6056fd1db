-- Work on layers that ran over its time. The key names the work and the layers' contents.
CREATE TABLE slow_work (
    key TEXT PRIMARY KEY NOT NULL CHECK (length(key) = 64),
    reason TEXT NOT NULL,
    last INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX slow_work_by_last ON slow_work (last);
