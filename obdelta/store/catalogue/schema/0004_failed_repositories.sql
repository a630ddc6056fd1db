-- The repositories of failed images, for operators; '' for failures recorded earlier.

ALTER TABLE failures ADD COLUMN base_repository TEXT NOT NULL DEFAULT '';
ALTER TABLE failures ADD COLUMN target_repository TEXT NOT NULL DEFAULT '';
