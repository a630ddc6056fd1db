-- The key in `slow_work` of the work that ran over its time; '' for other failures, and for those
-- that were recorded earlier. These still find their work by its reason.
ALTER TABLE repository_failures ADD COLUMN work TEXT NOT NULL DEFAULT ''
    CHECK (length(work) IN (0, 64));
