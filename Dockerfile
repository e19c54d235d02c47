# docker build -t scalerun . && docker run --rm -v "$PWD/work:/work" scalerun experiment=demo
FROM python:3.11-slim
WORKDIR /opt/scalerun
COPY requirements.lock ./
RUN pip install --no-cache-dir --disable-pip-version-check -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps .
WORKDIR /work
ENTRYPOINT ["scalerun"]
