"""HTTP to the upstream: connections, bodies, redirects and retries."""
