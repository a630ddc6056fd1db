// Signs registry tokens as open-balena-api does (jsonwebtoken, same options).
// stdin: a JSON list of {key, algorithm, kid, issuer, audience, subject, access, now, expiresIn}.
// stdout: the list of tokens.
'use strict';

const { randomUUID } = require('node:crypto');
const jsonwebtoken = require('jsonwebtoken');

let asked = '';
process.stdin.setEncoding('utf8');
process.stdin.on('data', (chunk) => (asked += chunk));
process.stdin.on('end', () => {
	const tokens = JSON.parse(asked).map((one) =>
		jsonwebtoken.sign(
			{ jti: randomUUID(), iat: one.now, nbf: one.now - 10, access: one.access },
			one.key,
			{
				algorithm: one.algorithm,
				issuer: one.issuer,
				audience: one.audience,
				subject: one.subject,
				expiresIn: one.expiresIn,
				keyid: one.kid,
			},
		),
	);
	process.stdout.write(JSON.stringify(tokens));
});
