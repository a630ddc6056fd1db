-- The recipe whose build failed; 0 for failures recorded earlier.
-- Verdicts of an older recipe do not outlive an upgrade.
ALTER TABLE failures ADD COLUMN recipe INTEGER NOT NULL DEFAULT 0;
