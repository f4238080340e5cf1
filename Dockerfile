# The image of a training job: the README's commands on a bare Python. `--build-arg=EXTRAS=cuda` makes that for GPUs.
FROM python:3.12-slim
ARG EXTRAS=tpu
WORKDIR /opt/snapgen
COPY . .
RUN python -m venv .venv
RUN .venv/bin/python -m pip install uv
RUN .venv/bin/uv pip install --python .venv/bin/python --constraint requirements.lock --editable ".[${EXTRAS}]"
ENV PATH=/opt/snapgen/.venv/bin:$PATH
