-- Which images failed, in words that an operator knows; '' for failures of before.

ALTER TABLE failures ADD COLUMN base_repository TEXT NOT NULL DEFAULT '';
ALTER TABLE failures ADD COLUMN target_repository TEXT NOT NULL DEFAULT '';
