-- How long devices took for delta layers, by which links and commands of a fleet are estimated.
-- The newest download of each device and layer.
CREATE TABLE device_downloads (
    device TEXT NOT NULL CHECK (length(device) = 64),  -- hash of a token's subject or an address
    layer TEXT NOT NULL CHECK (length(layer) = 64),    -- digest of the layer's blob
    base_repository TEXT NOT NULL,
    target_repository TEXT NOT NULL,
    engine TEXT NOT NULL CHECK (engine IN ('gzip', 'zstd')),  -- the best form that it reads
    size INTEGER NOT NULL CHECK (size > 0),                   -- of the blob
    commands INTEGER NOT NULL,                                -- of the layer's stream
    target_size INTEGER NOT NULL,                             -- of the layer that they make
    seconds REAL NOT NULL CHECK (seconds > 0),                -- for the whole layer
    last INTEGER NOT NULL,                                    -- seconds UTC
    PRIMARY KEY (device, layer)
) STRICT, WITHOUT ROWID;
CREATE INDEX device_downloads_by_target ON device_downloads (target_repository, engine, device);
CREATE INDEX device_downloads_by_last ON device_downloads (last);
