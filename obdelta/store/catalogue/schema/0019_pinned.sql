-- 1: an operator has pinned the delta, and the quota does not evict it.
ALTER TABLE deltas ADD COLUMN pinned INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1));
