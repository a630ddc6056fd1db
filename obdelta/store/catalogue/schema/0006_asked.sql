-- Updates that devices requested, from which image to which: worth prebuilding.
-- `base` is as requested: "sha256:…", a tag, or "" if neither was given.
CREATE TABLE asked (
    target_repository TEXT NOT NULL,
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL,
    last INTEGER NOT NULL,
    PRIMARY KEY (target_repository, base_repository, base)
) STRICT, WITHOUT ROWID;
CREATE INDEX asked_by_target ON asked (target_repository, last);
CREATE INDEX asked_by_last ON asked (last);
