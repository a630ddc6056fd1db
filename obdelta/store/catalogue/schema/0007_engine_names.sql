-- Names that a balena-engine has of us, and the image ID behind each ("" for a delta under construction): written down before
-- it gets them, so that what a killed server or an engine that died leaves behind is removed later.
CREATE TABLE engine_names (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL
) STRICT, WITHOUT ROWID;
