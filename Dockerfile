# The container image of obdelta: docs/docker.md describes how to build and run it.
#
# release.yml builds it for several architectures at once, with attestations of provenance and
# content.
#
# The base is any Debian-like image with Python 3.11 or later, for any architecture.
# Both stages use it, because the virtual environment needs the interpreter that made it.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Optional: another package index, and a file in the base image with certificate authorities
# (for a network whose proxy terminates TLS). Neither is in the final image.
ARG PIP_INDEX_URL
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The official Python images contain headers and venv; Debian has them in extra packages.
RUN set -e; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || { echo "obdelta needs Python 3.11 or later" >&2; exit 1; }; \
    wanted="binutils gcc libc6-dev"; \
    python3 -c 'import ensurepip' 2>/dev/null || wanted="$wanted python3-venv"; \
    test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
        || wanted="$wanted python3-dev"; \
    apt-get update; \
    apt-get install --yes --no-install-recommends $wanted
# pip has its own environment, so that the shipped one does not contain it.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/obdelta
# The dependencies first: they change less often than the source.
COPY requirements.lock /requirements.lock
RUN /tools/bin/pip --python /opt/obdelta/bin/python3 install --require-hashes \
        --requirement /requirements.lock
COPY . /source
# The version of a release, X.Y.Z; the source that is copied has no git to find it by.
ARG VERSION
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_OBDELTA="$VERSION" \
        /tools/bin/pip wheel --no-deps --wheel-dir /wheel /source
# Removes what no process loads: the tests of packages, debugging symbols, the packages with which
# rich displays source code and Markdown, the parser that cffi compiles with, and the variant of
# zstandard for other Pythons.
RUN set -e; \
    /tools/bin/pip --python /opt/obdelta/bin/python3 install --no-deps /wheel/*.whl; \
    /tools/bin/pip --python /opt/obdelta/bin/python3 uninstall --yes \
        markdown-it-py mdurl pygments pycparser; \
    gcc -O2 -Wall -Wextra -Werror -o /opt/obdelta/bin/low-ports /source/deploy/image/low-ports.c; \
    rm /opt/obdelta/lib/python3*/site-packages/zstandard/*_cffi.*; \
    find /opt/obdelta -type d \( -name test -o -name tests \) -prune -exec rm -r {} +; \
    find /opt/obdelta \( -name '*.so*' -o -name low-ports \) -type f \
        -exec strip --strip-unneeded {} +
# Twisted caches its list of plugins, which it cannot write into a read-only file system.
RUN /opt/obdelta/bin/twistd obdelta --version

FROM ${BASE}
LABEL org.opencontainers.image.title="obdelta" \
      org.opencontainers.image.description="Container image deltas for openBalena devices" \
      org.opencontainers.image.licenses="Apache-2.0"
# rsync makes the v2 deltas. A new volume gets the owner of the directory on which it is mounted:
# the state, and the two directories of installations that ran open-balena-delta.
# open-balena-helm links the API's certificate into /certs/private after the start.
RUN set -e; \
    apt-get update; \
    apt-get install --yes --no-install-recommends rsync; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt; \
    groupadd --gid 10001 obdelta; \
    useradd --uid 10001 --gid 10001 --home-dir /var/lib/obdelta --no-create-home \
        --shell /usr/sbin/nologin obdelta; \
    install --directory --owner=10001 --group=10001 --mode=0750 \
        /var/lib/obdelta /delta-rsync /var/lib/balena-engine; \
    install --directory --owner=10001 --group=10001 --mode=0755 /certs/private
COPY --from=build /opt/obdelta /opt/obdelta
# cap_net_bind_service in the permitted set only (vfs_cap_data in capabilities(7), version 2; bit
# 10). low-ports.c gives the reason.
RUN python3 -c "import os, struct; \
    os.setxattr('/opt/obdelta/bin/low-ports', 'security.capability', \
                struct.pack('<5I', 2 << 24, 1 << 10, 0, 0, 0))"
ENV PATH=/opt/obdelta/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
# Not the state: twistd imports modules from its working directory.
WORKDIR /
VOLUME /var/lib/obdelta
EXPOSE 80 8080
# The operators' endpoint is plain HTTP. Set HEALTH_URL where a settings file moves it. No proxy is
# used.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, re, urllib.request as web; \
port = re.search(r':(?:port=)?([0-9]+)', \
    os.environ.get('OBDELTA_OPERATOR_LISTEN') or 'tcp:9100')[1]; \
web.build_opener(web.ProxyHandler({})).open( \
os.environ.get('HEALTH_URL') or f'http://127.0.0.1:{port}/healthz', timeout=8)"]
# The exec form makes twistd process 1, which receives SIGTERM. It logs to standard output.
# Arguments of `docker run` are settings.
ENTRYPOINT ["low-ports", "twistd", "-n", "--pidfile=", "obdelta"]
