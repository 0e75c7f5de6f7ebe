# kdpipe on CPUs:
#
#   docker build -t kdpipe .
#   docker run --rm kdpipe                                      # the demo, about two minutes
#   docker run --rm -v "$PWD:/work" -w /work -u "$(id -u)" kdpipe run recipe.toml
#
FROM python:3.12-slim AS build
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /source
COPY . .
RUN uv venv --python /usr/local/bin/python /opt/kdpipe \
    && uv pip install --no-cache --compile-bytecode --python /opt/kdpipe/bin/python --torch-backend cpu .

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 kdpipe
COPY --from=build /opt/kdpipe /opt/kdpipe
ENV PATH=/opt/kdpipe/bin:$PATH
USER 1000
WORKDIR /home/kdpipe
ENTRYPOINT ["kdpipe"]
CMD ["demo"]
