-- Names that a balena-engine holds for obdelta, and the image ID of each ("" for a running build).
-- Recorded before the engine gets them, so that they are removed even after a crash of either side.
CREATE TABLE engine_names (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL
) STRICT, WITHOUT ROWID;
