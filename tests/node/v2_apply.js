// Applies a v2 stream as a supervisor does: node v2_apply.js MAJOR SOURCE_IMAGE STREAM_FILE
// DOCKER_HOST names the engine. Prints one line of JSON: {"id": …} or
// {"error": name, "message": …, "outOfSync": bool}.
'use strict';

const fs = require('node:fs');

const [major, source, path] = process.argv.slice(2);
const dockerDelta = require(`docker-delta-${major}`);

const say = (value) => {
	process.stdout.write(JSON.stringify(value) + '\n', () => process.exit(0));
};

// The metadata is written first, and the batch once rsync has started: docker-delta 2 on this Node
// can stall when more than its buffers hold arrives before that.
const stream = fs.readFileSync(path);
const batchAt = stream.indexOf(0) + 1;

const said = [];
const log = (...words) => {
	said.push(words.join(' '));
	if (said.at(-1).startsWith('Spawning rsync')) {
		setImmediate(() => applied.end(stream.subarray(batchAt)));
	}
};
const options = { timeout: 60000, log };
const applied =
	major === '2'
		? dockerDelta.applyDelta(source, options)
		: dockerDelta.applyDelta(
				new (require('docker-delta-4/node_modules/dockerode'))(),
				source,
				options,
			);
applied
	.on('id', (id) => say({ id, log: said }))
	.on('error', (error) =>
		say({
			error: error.name,
			message: error.message,
			outOfSync: error instanceof dockerDelta.OutOfSyncError,
			log: said,
		}),
	);
applied.write(stream.subarray(0, batchAt));
