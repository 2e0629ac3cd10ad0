# docker build -t open-unmix .                      for the CPU
# docker build -t open-unmix --target gpu .         for NVIDIA GPUs
# docker run --rm -v "$PWD:/data" -v open-unmix:/cache open-unmix separate song.mp3 --model umxhq
# and --gpus all behind --rm for the latter

FROM python:3.10-slim AS base
RUN apt-get update && apt-get install -y --no-install-recommends ffmpeg && rm -rf /var/lib/apt/lists/*
COPY requirements.lock /open-unmix/
RUN python -m pip install --no-cache-dir --require-hashes -r /open-unmix/requirements.lock
# What is downloaded and compiled outlives a container if /cache does, whoever runs it.
ENV PYTHONPATH=/open-unmix XDG_CACHE_HOME=/cache NUMBA_CACHE_DIR=/cache/numba MPLCONFIGDIR=/cache/matplotlib
RUN mkdir -m 1777 /cache
WORKDIR /data
ENTRYPOINT ["python", "-m"]
CMD ["separate", "--help"]

FROM base AS gpu
COPY requirements-gpu.lock /open-unmix/
RUN python -m pip install --no-cache-dir --require-hashes -r /open-unmix/requirements-gpu.lock
COPY . /open-unmix/

# The last one is what a build without --target makes.
FROM base AS cpu
COPY . /open-unmix/
