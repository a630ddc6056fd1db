// Updates as supervisors do:
//   node v2_update.js URL SOURCE_IMAGE_ID TIMEOUT_MS [MAJOR VERSION INTERVAL_MS [located]]
// URL is the request (/api/v2/delta?…), or with `located` the stream. DOCKER_HOST names the engine.
// Prints one line of JSON: {"id": …, "retries": …, "location": …} or {"error": …, "outOfSync": …}.
// MAJOR is the version of docker-delta: 2 (the default) as in supervisors of 2018 to 2022, which
// run on Node 12; 4 as in supervisors from 16.2.33.
'use strict';

const http = require('http');
const resumable = require('resumable-request');

const [question, source, timeout, major = '2', version = '12.11.38', interval = '100', located] =
	process.argv.slice(2);
const { applyDelta, OutOfSyncError } = require(`docker-delta-${major}`);
const headers = { 'User-Agent': `Supervisor/${version} (Linux; balenaOS 2.80.3+rev1; prod)` };
const options = { timeout: 0, log: () => undefined };
const applied = () =>
	major === '2'
		? applyDelta(source, options)
		: applyDelta(new (require('docker-delta-4/node_modules/dockerode'))(), source, options);

const say = (value) => {
	process.stdout.write(JSON.stringify(value) + '\n', () => process.exit(0));
};
const ask = () =>
	http.get(question, { headers }, (answer) => {
		answer.resume();
		if (answer.statusCode === 502 || answer.statusCode === 504) {
			ask(); // "still processing"
		} else if (
			answer.statusCode < 300 ||
			answer.statusCode >= 400 ||
			!answer.headers.location
		) {
			say({ error: `Got ${answer.statusCode} when requesting an image from delta server.` });
		} else {
			download(answer.headers.location);
		}
	});

const download = (location) => {
	let retries = 0;
	// Theirs are 59 and 10 seconds. A connection that was reset is noticed by this time-out alone.
	const request = resumable({
		url: location,
		timeout: Number(timeout),
		maxRetries: 30,
		retryInterval: Number(interval),
	});
	request
		.on('retry', () => retries++)
		.on('error', (error) => say({ error: `download: ${error.message}` }))
		.on('response', (response) => {
			if (response.statusCode !== 200) {
				say({ error: `Got ${response.statusCode} when requesting delta from storage.` });
			} else if (parseInt(response.headers['content-length'] || '0', 10) === 0) {
				say({ error: 'Invalid delta URL' });
			} else {
				response
					.pipe(applied())
					.on('id', (id) => say({ id, retries, location }))
					.on('error', (error) =>
						say({
							error: `delta: ${error.name}: ${error.message}`,
							outOfSync: error instanceof OutOfSyncError,
						}),
					);
			}
		});
};

if (located) {
	download(question);
} else {
	ask();
}
