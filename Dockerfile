# docker build -t drava .
# docker run --security-opt seccomp=unconfined --ulimit memlock=-1 -p 7400-7464:7400-7464 -v drava:/data drava
#
# The seccomp profile that containers have by default forbids io_uring; one of your own that allows io_uring_setup,
# io_uring_enter and io_uring_register does as well.
FROM rust:1.95-bookworm AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends clang libclang-dev g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package drava --bin drava

FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends libstdc++6 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --create-home --home-dir /data --uid 7400 drava
COPY --from=build /src/target/release/drava /usr/local/bin/drava
USER drava
VOLUME /data
# Inside, everything listens on all addresses; what is reachable is for docker's -p to say.
ENV DRAVA_DATA_DIR=/data/drava DRAVA_LISTEN=0.0.0.0:7400 DRAVA_ADMIN_LISTEN=0.0.0.0:7480
EXPOSE 7400-7464 7480
STOPSIGNAL SIGTERM
ENTRYPOINT ["drava"]
CMD ["node"]
