# Of a clone: docker build -t twinflow .
#   on TPUs:  docker build -t twinflow --build-arg EXTRAS=pod .
#   run:      docker run --rm -v "$PWD/runs:/data/runs" twinflow train --config digits --workdir runs/digits
# On a TPU VM add --privileged --network host.
FROM python:3.12-slim

ARG EXTRAS=demo
# Of the package; .git stays outside: --build-arg VERSION="$(git describe --tags)"
ARG VERSION=0.0.0

WORKDIR /src
COPY . .
RUN SETUPTOOLS_SCM_PRETEND_VERSION="${VERSION}" \
    pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" \
    && useradd --create-home --uid 1000 twinflow \
    && install -d -o twinflow /data

USER twinflow
WORKDIR /data
ENTRYPOINT ["twinflow"]
CMD ["--help"]
