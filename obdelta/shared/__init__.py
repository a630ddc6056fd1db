"""What replicas on several machines share through Redis: who builds a pair, and how that ended."""
