# The server on CPUs. From the root of the source tree:
#   docker build -f runtime/serve/deploy/cpu.Dockerfile -t turbochain:cpu .
#   docker run --init -p 127.0.0.1:8000:8000 -e TURBOCHAIN_API_KEY -v /srv/sd-turbo.bundle:/bundle:ro turbochain:cpu
# What follows the image's name are further options of `turbochain serve`. The bundle needs an engine for OpenVINO.
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
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheels/*.whl)[openvino,serve]"
# The user must be able to read the bundle: chmod -R a+rX.
RUN useradd --uid 10001 --create-home turbochain
USER turbochain
# Else Python keeps a MiB for as long as one object in it lives, and does not give it back.
ENV PYTHONMALLOC=malloc
EXPOSE 8000
STOPSIGNAL SIGTERM
# Of port 8000: with another --port give docker run another --health-cmd.
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["turbochain", "serve", "/bundle", "--host", "0.0.0.0"]
