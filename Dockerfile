# obdelta as an image: docs/docker.md says how to build and run it.
#
# Any Debian-like base with Python 3.11 or later will do. Both stages stand on it: the virtual environment that one makes, the
# other runs with the same interpreter. Nothing here names an architecture.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# Where pip looks for packages, if not at its usual place, and which authorities it trusts, if not its own (a file of the base,
# where a company's proxy looks into TLS); never in the final image.
ARG PIP_INDEX_URL
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Python's own images have headers and venv; Debian's python3 has them in packages.
RUN set -e; \
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "obdelta needs Python 3.11 or later" >&2; exit 1; }; \
    wanted="binutils gcc libc6-dev"; \
    python3 -c 'import ensurepip' 2>/dev/null || wanted="$wanted python3-venv"; \
    test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || wanted="$wanted python3-dev"; \
    apt-get update; \
    apt-get install --yes --no-install-recommends $wanted
# pip lives in an environment of its own, so that the one which is shipped has none.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/obdelta
COPY . /source
RUN /tools/bin/pip wheel --no-deps --wheel-dir /wheel /source
# What no process of ours loads goes: the packages' own tests, and debugging symbols of their extension modules.
RUN set -e; \
    /tools/bin/pip --python /opt/obdelta/bin/python3 install /wheel/*.whl; \
    gcc -O2 -Wall -Wextra -Werror -o /opt/obdelta/bin/low-ports /source/deploy/image/low-ports.c; \
    find /opt/obdelta -type d \( -name test -o -name tests \) -prune -exec rm -r {} +; \
    find /opt/obdelta \( -name '*.so*' -o -name low-ports \) -type f -exec strip --strip-unneeded {} +
# Twisted caches which plugins there are; it could not write that into a read-only file system.
RUN /opt/obdelta/bin/twistd obdelta --version

FROM ${BASE}
LABEL org.opencontainers.image.title="obdelta" \
      org.opencontainers.image.description="Container image deltas for openBalena devices" \
      org.opencontainers.image.licenses="Apache-2.0"
# rsync makes the v2 deltas. New volumes get the owner of the folders that they are mounted on from the image: the state, and the
# two that stacks with open-balena-delta have. open-balena-helm links the API's certificate into /certs/private once we run.
RUN set -e; \
    apt-get update; \
    apt-get install --yes --no-install-recommends rsync; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt; \
    groupadd --gid 10001 obdelta; \
    useradd --uid 10001 --gid 10001 --home-dir /var/lib/obdelta --no-create-home --shell /usr/sbin/nologin obdelta; \
    install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/obdelta /delta-rsync /var/lib/balena-engine; \
    install --directory --owner=10001 --group=10001 --mode=0755 /certs/private
COPY --from=build /opt/obdelta /opt/obdelta
# cap_net_bind_service in the permitted set alone (vfs_cap_data of capabilities(7), version 2; bit 10). Why: low-ports.c.
RUN python3 -c "import os, struct; os.setxattr('/opt/obdelta/bin/low-ports', 'security.capability', struct.pack('<5I', 2 << 24, 1 << 10, 0, 0, 0))"
ENV PATH=/opt/obdelta/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# A number, by which Kubernetes sees that it is not root.
USER 10001:10001
# Not the state: twistd looks for modules where it is started.
WORKDIR /
VOLUME /var/lib/obdelta
EXPOSE 80 8080
# The operators' endpoint speaks plain HTTP whatever the devices' one does. HEALTH_URL says where it is if a settings file does. No
# proxy is asked.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, re, urllib.request as web; port = re.search(r':(?:port=)?([0-9]+)', os.environ.get('OBDELTA_OPERATOR_LISTEN') or 'tcp:9100')[1]; web.build_opener(web.ProxyHandler({})).open(os.environ.get('HEALTH_URL') or f'http://127.0.0.1:{port}/healthz', timeout=8)"]
# The exec form: twistd becomes process 1 and gets SIGTERM itself. It logs to standard output, and further arguments are settings.
ENTRYPOINT ["low-ports", "twistd", "-n", "--pidfile=", "obdelta"]
