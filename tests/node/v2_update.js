// Updates as supervisors of 2018 to 2022 do: node v2_update.js URL SOURCE_IMAGE_ID TIMEOUT_MS
// URL is the question (/api/v2/delta?…). DOCKER_HOST names the engine. One line of JSON on stdout:
// {"id": …, "retries": …, "location": …} or {"error": …}. For the Node that those supervisors run on, 12.
'use strict';

const http = require('http');
const resumable = require('resumable-request');
const { applyDelta } = require('docker-delta-2');

const [question, source, timeout] = process.argv.slice(2);
const headers = { 'User-Agent': 'Supervisor/12.11.38 (Linux; balenaOS 2.80.3+rev1; prod)' };

const say = (value) => {
	process.stdout.write(JSON.stringify(value) + '\n', () => process.exit(0));
};
const ask = () =>
	http.get(question, { headers }, (answer) => {
		answer.resume();
		if (answer.statusCode === 502 || answer.statusCode === 504) {
			ask(); // "still processing"
		} else if (answer.statusCode < 300 || answer.statusCode >= 400 || !answer.headers.location) {
			say({ error: `Got ${answer.statusCode} when requesting an image from delta server.` });
		} else {
			download(answer.headers.location);
		}
	});

const download = (location) => {
	let retries = 0;
	// Theirs are 59 and 10 seconds. A connection that was reset is noticed by this time-out alone.
	const request = resumable({ url: location, timeout: Number(timeout), maxRetries: 30, retryInterval: 100 });
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
					.pipe(applyDelta(source, { timeout: 0, log: () => undefined }))
					.on('id', (id) => say({ id, retries, location }))
					.on('error', (error) => say({ error: `delta: ${error.name}: ${error.message}` }));
			}
		});
};

ask();
