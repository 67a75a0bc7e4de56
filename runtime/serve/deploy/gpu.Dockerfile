# The server on an NVIDIA GPU. TensorRT-RTX and the CUDA runtime come by pip; the host has the driver and NVIDIA's
# container toolkit. From the root of the source tree:
#   docker build -f runtime/serve/deploy/gpu.Dockerfile -t turbochain:gpu .
#   docker run --init --gpus all -p 127.0.0.1:8000:8000 -e TURBOCHAIN_API_KEY \
#     -v /srv/sd-turbo.bundle:/bundle:ro -v turbochain-engines:/cache turbochain:gpu
# An engine is of one GPU and one version of the library: the first start builds it into /cache, which takes minutes, and
# later starts find it there. What follows the image's name are further options of `turbochain serve`.
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY export export
COPY engines engines
COPY runtime runtime
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[tensorrt-rtx,serve]"
# The user must be able to read the bundle: chmod -R a+rX.
RUN useradd --uid 10001 --create-home turbochain && install -d -o turbochain /cache
USER turbochain
# PYTHONMALLOC: else Python keeps a MiB for as long as one object in it lives, and does not give it back.
ENV PYTHONMALLOC=malloc XDG_CACHE_HOME=/cache NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Of port 8000: with another --port give docker run another --health-cmd.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# The shell becomes the server, so that SIGTERM reaches it; "$@" are the further options.
ENTRYPOINT ["sh", "-c", "build-engine /bundle --backend tensorrt && exec turbochain serve /bundle --backend tensorrt --host 0.0.0.0 \"$@\"", "turbochain"]
CMD []
