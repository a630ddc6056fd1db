PRAGMA user_version = 14;
PRAGMA application_id = 1868719212;
BEGIN TRANSACTION;
CREATE TABLE asked (
    target_repository TEXT NOT NULL,
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL,
    last INTEGER NOT NULL,
    PRIMARY KEY (target_repository, base_repository, base)
) STRICT, WITHOUT ROWID;
INSERT INTO "asked" VALUES('v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1','',1796039060);
INSERT INTO "asked" VALUES('v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1','v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','',1796039068);
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY NOT NULL CHECK (length(digest) = 64),
    size INTEGER NOT NULL CHECK (size >= 0)
, evicted INTEGER NOT NULL DEFAULT 0 CHECK (evicted IN (0, 1))) STRICT, WITHOUT ROWID;
INSERT INTO "blobs" VALUES('c2866a5a2f68abdfb5a076557d742578b776281764a4d7d70c21795435555d78',83,0);
INSERT INTO "blobs" VALUES('140bd232d016c74484a7ba1b5fbb1fc94136357878d0783c228aa8cde44cf0cb',86,0);
INSERT INTO "blobs" VALUES('b274bd89dbfbe16b953495fd216d61f4c0819ce6cbbcdfe9f6bcd906ac343c9c',86,0);
INSERT INTO "blobs" VALUES('d2d279892e709aa43487ce6e739b612136f35a892b1be29294d96d32a09367b6',238,0);
INSERT INTO "blobs" VALUES('3b15a8ec427e5ae0e7bf3bf4f3970cdf6cc9a7abe163d22121807e5cea30f46e',332,0);
INSERT INTO "blobs" VALUES('9ae54be35d52ebc6ddc666154982d9f978ff9e49bc13238466d54e83a723d7b6',645,0);
INSERT INTO "blobs" VALUES('bebf76c649bd44faae8e93b80a52ed9bdf4ef5f57d281bd427ce604f81557895',2154,0);
INSERT INTO "blobs" VALUES('35fb2a2eefeb37453b886a303b6eca837878adae3e2a05b645d4d16016b46161',5573,0);
CREATE TABLE counters (
    name TEXT PRIMARY KEY NOT NULL,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "counters" VALUES('build.not-worth',1);
INSERT INTO "counters" VALUES('full_pull.not-worth',1);
INSERT INTO "counters" VALUES('served.v2.delta_bytes',5573);
INSERT INTO "counters" VALUES('served.v2.deltas',1);
INSERT INTO "counters" VALUES('served.v2.full_bytes',35813);
INSERT INTO "counters" VALUES('served.v3.delta_bytes',3541);
INSERT INTO "counters" VALUES('served.v3.deltas',1);
INSERT INTO "counters" VALUES('served.v3.full_bytes',35813);
CREATE TABLE deltas (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    recipe INTEGER NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target TEXT NOT NULL CHECK (length(target) = 64),  -- digest of the target image's manifest
    base_repository TEXT NOT NULL,                     -- the first one; publications has all
    target_repository TEXT NOT NULL,
    tag TEXT UNIQUE,                                   -- v3: its tag in each target repository
    -- v3: digest of the delta image's manifest; v2: of the batch
    content TEXT NOT NULL CHECK (length(content) = 64),
    full_bytes INTEGER NOT NULL,
    delta_bytes INTEGER NOT NULL,
    seconds REAL NOT NULL,
    created INTEGER NOT NULL,
    last_served INTEGER NOT NULL,                      -- created, until it is served
    served INTEGER NOT NULL,
    details TEXT NOT NULL,                             -- JSON
    UNIQUE (kind, recipe, base, target),
    CHECK ((kind = 'v3') = (tag IS NOT NULL))
) STRICT;
INSERT INTO "deltas" VALUES(1,'v3',7,'2c16a7ccf61f4a943ba23af9f8dfddbc30c9fd7865b4189452dee1d649390bbb','e8f902a8fc5ce9fa271d4923d7e3fb9942094860d96e9e35f7bf04e6e0dc9304','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1','v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','delta-a30af99f36f87052','373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6',35813,3541,7.14968186000078276265e-01,1796039060,1796039060,1,'{"common": 1, "effort": "balanced", "layers": [{"copied_bytes": 6494, "copies": 21, "diff_id": "sha256:13664fe9573153d3a7029a5c2b767b79547b37f712d3af849f9ab1e16b79a198", "digest": "sha256:3b15a8ec427e5ae0e7bf3bf4f3970cdf6cc9a7abe163d22121807e5cea30f46e", "excess": 0, "explained": {"changed": 2, "entries": 5, "rest": {"copied_bytes": 2560, "copies": 2, "literal_bytes": 0, "small_copies": 0, "wire_bytes": 15}, "top": [{"copied_bytes": 2466, "copies": 11, "literal_bytes": 94, "name": "usr/bin/interpreter", "size": 1583, "small_copies": 1, "wire_bytes": 183}, {"copied_bytes": 1468, "copies": 8, "literal_bytes": 68, "name": "usr/lib/libruntime.so.1.3", "size": 546, "small_copies": 1, "wire_bytes": 134}]}, "literal_bytes": 162, "lost": 0, "seconds": {"deflate": 0.0049136359998556145, "index": 0.003112379999947734, "match": 0.00023127199983719038, "prove": 0.001362946999961423}, "size": 332, "small_copies": 2, "tar_size": 2048, "target": "sha256:15d489ea8ea3f567884e1a057907ba7a7769dc89079b2cdcc9ab5121a1e9de2e"}, {"copied_bytes": 16784, "copies": 33, "diff_id": "sha256:65a61032fec6d5a0c8aa083474a664fdbc96993078ae31f26b80ffad08f8c410", "digest": "sha256:9ae54be35d52ebc6ddc666154982d9f978ff9e49bc13238466d54e83a723d7b6", "excess": 0, "explained": {"changed": 15, "entries": 18, "rest": {"copied_bytes": 2560, "copies": 2, "literal_bytes": 0, "small_copies": 0, "wire_bytes": 19}, "top": [{"copied_bytes": 865, "copies": 3, "literal_bytes": 159, "name": "usr/lib/modules/added.txt", "size": 128, "small_copies": 0, "wire_bytes": 112}, {"copied_bytes": 911, "copies": 2, "literal_bytes": 113, "name": "usr/lib/modules/m03.txt", "size": 124, "small_copies": 0, "wire_bytes": 88}, {"copied_bytes": 947, "copies": 2, "literal_bytes": 77, "name": "usr/lib/modules/m04.txt", "size": 64, "small_copies": 0, "wire_bytes": 63}, {"copied_bytes": 1466, "copies": 7, "literal_bytes": 70, "name": "usr/lib/modules/native.so", "size": 796, "small_copies": 2, "wire_bytes": 98}, {"copied_bytes": 990, "copies": 2, "literal_bytes": 34, "name": "usr/lib/modules/vendored/table.bin", "size": 512, "small_copies": 0, "wire_bytes": 40}, {"copied_bytes": 990, "copies": 3, "literal_bytes": 34, "name": "usr/lib/moved/m05.txt", "size": 64, "small_copies": 0, "wire_bytes": 45}, {"copied_bytes": 494, "copies": 2, "literal_bytes": 18, "name": "usr/lib/moved/", "size": 0, "small_copies": 0, "wire_bytes": 26}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m02.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m06.txt", "size": 59, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m07.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m08.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m09.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m10.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 1009, "copies": 1, "literal_bytes": 15, "name": "usr/lib/modules/m11.txt", "size": 64, "small_copies": 0, "wire_bytes": 18}, {"copied_bytes": 498, "copies": 3, "literal_bytes": 14, "name": "usr/lib/modules/vendored/", "size": 0, "small_copies": 1, "wire_bytes": 28}]}, "literal_bytes": 624, "lost": 0, "seconds": {"deflate": 0.0022030550003364624, "index": 0.000519914000051358, "match": 0.0003094969997619046, "prove": 0.0010284509999110014}, "size": 645, "small_copies": 3, "tar_size": 2560, "target": "sha256:b85b3cafff1a50d3875ddd6d1b2aa8179a88ca6f865be8c118a86c048195df22"}, {"copied_bytes": 5008, "copies": 10, "diff_id": "sha256:de6e1f5f12e11d5f7efb76863601c5fbed7d5fc25aa8c4d216d02af20ae5f841", "digest": "sha256:d2d279892e709aa43487ce6e739b612136f35a892b1be29294d96d32a09367b6", "excess": 0, "explained": {"changed": 2, "entries": 6, "rest": {"copied_bytes": 3584, "copies": 3, "literal_bytes": 0, "small_copies": 0, "wire_bytes": 29}, "top": [{"copied_bytes": 934, "copies": 3, "literal_bytes": 90, "name": "app/main.txt", "size": 188, "small_copies": 1, "wire_bytes": 140}, {"copied_bytes": 490, "copies": 4, "literal_bytes": 22, "name": "usr/share/.wh.licence.txt", "size": 0, "small_copies": 1, "wire_bytes": 69}]}, "literal_bytes": 112, "lost": 0, "seconds": {"deflate": 0.0005336119997991773, "index": 0.0002723659999901429, "match": 0.0001487900003667164, "prove": 0.0009884370001600473}, "size": 238, "small_copies": 2, "tar_size": 2048, "target": "sha256:9eaf7d5f042cdf93b4988f02d9e21eabb1b1eb973440558919828922d0ed6915"}, {"copied_bytes": 4608, "copies": 1, "diff_id": "sha256:4f688a6b02b25ae70a3bb8cd603530795dd5a24935551770a1cfd4cc09c05b69", "digest": "sha256:140bd232d016c74484a7ba1b5fbb1fc94136357878d0783c228aa8cde44cf0cb", "excess": 0, "explained": null, "literal_bytes": 0, "lost": 0, "seconds": {"deflate": 0.006693700000141689, "prove": 0.0015908380000837496}, "size": 86, "small_copies": 0, "tar_size": 2048, "target": "sha256:4cbe3b98c7a1b8e28a5508d2765f03eea1206756352fe753de6aef3b0a4e404c"}, {"copied_bytes": 1024, "copies": 1, "diff_id": "sha256:07bcaa006f8d826a8300fa61bd5f0546bc656a787cfcb336d6dffae98e194426", "digest": "sha256:b274bd89dbfbe16b953495fd216d61f4c0819ce6cbbcdfe9f6bcd906ac343c9c", "excess": 0, "explained": {"changed": 0, "entries": 0, "rest": {"copied_bytes": 1024, "copies": 1, "literal_bytes": 0, "small_copies": 0, "wire_bytes": 86}, "top": []}, "literal_bytes": 0, "lost": 0, "seconds": {"deflate": 0.000418446000367112, "index": 7.851899999877787e-05, "match": 0.00011237499984417809, "prove": 0.0005156250003892637}, "size": 86, "small_copies": 0, "tar_size": 2048, "target": "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"}], "seconds": {"fetch": 0.671}}');
INSERT INTO "deltas" VALUES(2,'v2',2,'2c16a7ccf61f4a943ba23af9f8dfddbc30c9fd7865b4189452dee1d649390bbb','e8f902a8fc5ce9fa271d4923d7e3fb9942094860d96e9e35f7bf04e6e0dc9304','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1','v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2',NULL,'35fb2a2eefeb37453b886a303b6eca837878adae3e2a05b645d4d16016b46161',35813,5573,1.01708389800023724092e+00,1796039061,1796039061,1,'{"entries": 52, "name": "bf9c5dfa1ea8720a03d6757a73b92339", "seconds": {"fetch": 0.365, "prove": 0.442, "record": 0.21}, "sent_index": 35, "shares": {"copied_bytes": 0, "copies": 0, "files": 9, "head": 1218, "size": 4005, "top": [{"copied_bytes": 0, "copies": 0, "name": "usr/bin/interpreter", "size": 1583, "wire_bytes": 1412}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/modules/native.so", "size": 796, "wire_bytes": 823}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/libruntime.so.1.3", "size": 546, "wire_bytes": 573}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/modules/vendored/table.bin", "size": 512, "wire_bytes": 556}, {"copied_bytes": 0, "copies": 0, "name": "app/main.txt", "size": 188, "wire_bytes": 165}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/modules/m03.txt", "size": 124, "wire_bytes": 132}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/modules/added.txt", "size": 128, "wire_bytes": 127}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/modules/m04.txt", "size": 64, "wire_bytes": 96}, {"copied_bytes": 0, "copies": 0, "name": "usr/lib/moved/m05.txt", "size": 64, "wire_bytes": 94}], "wire_bytes": 3978}, "tail": 17}');
CREATE TABLE engine_names (
    name TEXT PRIMARY KEY,
    image TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE "failures" (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    outcome TEXT NOT NULL CHECK (outcome IN ('not worth', 'proof failed', 'unusable', 'error')),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    base_repository TEXT NOT NULL DEFAULT '',
    target_repository TEXT NOT NULL DEFAULT '',
    recipe INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (kind, base, target)
) STRICT, WITHOUT ROWID;
INSERT INTO "failures" VALUES('v3','e8f902a8fc5ce9fa271d4923d7e3fb9942094860d96e9e35f7bf04e6e0dc9304','2c16a7ccf61f4a943ba23af9f8dfddbc30c9fd7865b4189452dee1d649390bbb','not worth','not worth it: the delta has 2946 bytes, the full download 33121',1,1796039068,'v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1',7);
CREATE TABLE hours (
    hour INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    deltas INTEGER NOT NULL,
    full_bytes INTEGER NOT NULL,
    delta_bytes INTEGER NOT NULL,
    PRIMARY KEY (hour, kind)
) STRICT, WITHOUT ROWID;
INSERT INTO "hours" VALUES(498899,'v2',1,35813,5573);
INSERT INTO "hours" VALUES(498899,'v3',1,35813,3541);
CREATE TABLE layers (
    blob TEXT PRIMARY KEY NOT NULL CHECK (length(blob) = 64),
    blob_size INTEGER NOT NULL,
    diff_id TEXT NOT NULL CHECK (length(diff_id) = 64),
    size INTEGER NOT NULL,
    media_type TEXT NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO "layers" VALUES('15d489ea8ea3f567884e1a057907ba7a7769dc89079b2cdcc9ab5121a1e9de2e',6656,'15d489ea8ea3f567884e1a057907ba7a7769dc89079b2cdcc9ab5121a1e9de2e',6656,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('451a9e3aedbf1994689a84078d7f31f7e612a407da2fbdfa4ba25b216e371adb',17408,'451a9e3aedbf1994689a84078d7f31f7e612a407da2fbdfa4ba25b216e371adb',17408,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('4a0c31a68cb8b6162382add4b2478fec1608774ef45e314042162a9e520a2208',23552,'4a0c31a68cb8b6162382add4b2478fec1608774ef45e314042162a9e520a2208',23552,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('4cbe3b98c7a1b8e28a5508d2765f03eea1206756352fe753de6aef3b0a4e404c',4608,'4cbe3b98c7a1b8e28a5508d2765f03eea1206756352fe753de6aef3b0a4e404c',4608,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('4f5241b3659bffd2425a29f725614a5f31fe840aa4cf214256e56586124c33d1',4608,'4f5241b3659bffd2425a29f725614a5f31fe840aa4cf214256e56586124c33d1',4608,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef',1024,'5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef',1024,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('9eaf7d5f042cdf93b4988f02d9e21eabb1b1eb973440558919828922d0ed6915',5120,'9eaf7d5f042cdf93b4988f02d9e21eabb1b1eb973440558919828922d0ed6915',5120,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('b85b3cafff1a50d3875ddd6d1b2aa8179a88ca6f865be8c118a86c048195df22',17408,'b85b3cafff1a50d3875ddd6d1b2aa8179a88ca6f865be8c118a86c048195df22',17408,'application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "layers" VALUES('fa2f119ce041949bff961b1d1aafa599ec4bbde7e2a1a67aa6bc77327828b460',5632,'fa2f119ce041949bff961b1d1aafa599ec4bbde7e2a1a67aa6bc77327828b460',5632,'application/vnd.docker.image.rootfs.diff.tar.gzip');
CREATE TABLE manifest_blobs (
    manifest TEXT NOT NULL REFERENCES manifests (digest) ON DELETE CASCADE,
    blob TEXT NOT NULL REFERENCES blobs (digest),
    media_type TEXT NOT NULL,
    PRIMARY KEY (manifest, blob)
) STRICT, WITHOUT ROWID;
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','140bd232d016c74484a7ba1b5fbb1fc94136357878d0783c228aa8cde44cf0cb','application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','3b15a8ec427e5ae0e7bf3bf4f3970cdf6cc9a7abe163d22121807e5cea30f46e','application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','9ae54be35d52ebc6ddc666154982d9f978ff9e49bc13238466d54e83a723d7b6','application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','b274bd89dbfbe16b953495fd216d61f4c0819ce6cbbcdfe9f6bcd906ac343c9c','application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','bebf76c649bd44faae8e93b80a52ed9bdf4ef5f57d281bd427ce604f81557895','application/vnd.docker.container.image.v1+json');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','c2866a5a2f68abdfb5a076557d742578b776281764a4d7d70c21795435555d78','application/vnd.docker.image.rootfs.diff.tar.gzip');
INSERT INTO "manifest_blobs" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','d2d279892e709aa43487ce6e739b612136f35a892b1be29294d96d32a09367b6','application/vnd.docker.image.rootfs.diff.tar.gzip');
CREATE TABLE manifests (
    digest TEXT PRIMARY KEY NOT NULL CHECK (length(digest) = 64),
    media_type TEXT NOT NULL,
    raw BLOB NOT NULL
) STRICT;
INSERT INTO "manifests" VALUES('373675fb4bacb7a1d5081a56f5666fa4740e45420fa8a061a8871f621abccfb6','application/vnd.docker.distribution.manifest.v2+json',X'7B22636F6E666967223A7B22646967657374223A227368613235363A62656266373663363439626434346661616538653933623830613532656439626466346566356635376432383162643432376365363034663831353537383935222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E636F6E7461696E65722E696D6167652E76312B6A736F6E222C2273697A65223A323135347D2C226C6179657273223A5B7B22646967657374223A227368613235363A63323836366135613266363861626466623561303736353537643734323537386237373632383137363461346437643730633231373935343335353535643738222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A38337D2C7B22646967657374223A227368613235363A33623135613865633432376535616530653762663362663466333937306364663663633961376162653136336432323132313830376535636561333066343665222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A3333327D2C7B22646967657374223A227368613235363A39616535346265333564353265626336646463363636313534393832643966393738666639653439626331333233383436366435346538336137323364376236222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A3634357D2C7B22646967657374223A227368613235363A64326432373938393265373039616134333438376365366537333962363132313336663335613839326231626532393239346439366433326130393336376236222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A3233387D2C7B22646967657374223A227368613235363A31343062643233326430313663373434383461376261316235666262316663393431333633353738373864303738336332323861613863646534346366306362222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A38367D2C7B22646967657374223A227368613235363A62323734626438396462666265313662393533343935666432313664363166346330383139636536636262636466653966366263643930366163333433633963222C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E696D6167652E726F6F7466732E646966662E7461722E677A6970222C2273697A65223A38367D5D2C226D6564696154797065223A226170706C69636174696F6E2F766E642E646F636B65722E646973747269627574696F6E2E6D616E69666573742E76322B6A736F6E222C22736368656D6156657273696F6E223A327D');
CREATE TABLE named_deltas (
    target_repository TEXT NOT NULL,
    tag TEXT NOT NULL,
    base_repository TEXT NOT NULL,                     -- the same contents may lie in several
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target TEXT NOT NULL CHECK (length(target) = 64),  -- digest of the target image's manifest
    last INTEGER NOT NULL,                             -- when it was last given, seconds UTC
    PRIMARY KEY (target_repository, tag, base_repository)
) STRICT, WITHOUT ROWID;
INSERT INTO "named_deltas" VALUES('v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','delta-a30af99f36f87052','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1','2c16a7ccf61f4a943ba23af9f8dfddbc30c9fd7865b4189452dee1d649390bbb','e8f902a8fc5ce9fa271d4923d7e3fb9942094860d96e9e35f7bf04e6e0dc9304',1796039060);
CREATE TABLE publications (
    delta INTEGER NOT NULL REFERENCES deltas (id) ON DELETE CASCADE,
    target_repository TEXT NOT NULL,
    base_repository TEXT NOT NULL,
    PRIMARY KEY (delta, target_repository, base_repository)
) STRICT, WITHOUT ROWID;
INSERT INTO "publications" VALUES(1,'v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1');
INSERT INTO "publications" VALUES(2,'v2/b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2','v2/a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1');
CREATE TABLE queued_builds (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base_repository TEXT NOT NULL,
    base TEXT NOT NULL CHECK (length(base) = 64),      -- digest of the base image's manifest
    target_repository TEXT NOT NULL,
    target TEXT NOT NULL CHECK (length(target) = 64),
    since INTEGER NOT NULL,
    starts INTEGER NOT NULL DEFAULT 0,                 -- how often a start resumed it
    UNIQUE (kind, base, target)
) STRICT;
CREATE TABLE repository_failures (
    kind TEXT NOT NULL CHECK (kind IN ('v2', 'v3')),
    base TEXT NOT NULL CHECK (length(base) = 64),
    target TEXT NOT NULL CHECK (length(target) = 64),
    reason TEXT NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    last INTEGER NOT NULL,
    base_repository TEXT NOT NULL,
    target_repository TEXT NOT NULL,
    recipe INTEGER NOT NULL,
    PRIMARY KEY (kind, base, target, base_repository, target_repository)
) STRICT, WITHOUT ROWID;
CREATE TABLE slow_work (
    key TEXT PRIMARY KEY NOT NULL CHECK (length(key) = 64),
    reason TEXT NOT NULL,
    last INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE started_pulls (
    token TEXT NOT NULL,
    manifest TEXT NOT NULL CHECK (length(manifest) = 64),
    repository TEXT NOT NULL,
    subject TEXT NOT NULL,
    until INTEGER NOT NULL,
    PRIMARY KEY (token, manifest, repository)
) STRICT, WITHOUT ROWID;
CREATE INDEX deltas_by_content ON deltas (content);
CREATE INDEX deltas_by_last_served ON deltas (last_served);
CREATE INDEX deltas_by_created ON deltas (created);
CREATE INDEX manifest_blobs_by_blob ON manifest_blobs (blob);
CREATE INDEX blobs_by_eviction ON blobs (evicted, size);
CREATE INDEX asked_by_target ON asked (target_repository, last);
CREATE INDEX asked_by_last ON asked (last);
CREATE INDEX started_pulls_by_subject ON started_pulls (subject, until);
CREATE INDEX started_pulls_by_until ON started_pulls (until);
CREATE INDEX slow_work_by_last ON slow_work (last);
CREATE INDEX repository_failures_by_last ON repository_failures (last);
CREATE INDEX failures_by_last ON failures (last);
CREATE INDEX named_deltas_by_last ON named_deltas (last);
CREATE VIEW layers_here AS
    SELECT manifest_blobs.manifest AS manifest, blobs.digest AS blob, blobs.size AS size
    FROM manifest_blobs CROSS JOIN blobs ON blobs.digest = manifest_blobs.blob
    WHERE blobs.evicted = 0 AND blobs.size > 4096
        AND manifest_blobs.media_type != 'application/vnd.docker.container.image.v1+json';
COMMIT;
