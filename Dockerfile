# The program as an image, which serves on PORT. See docs/deploy.md.
FROM python:3.13-slim

WORKDIR /opt/simulator
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
# What is in it is listed in .dockerignore.
COPY . .
# The one folder that it writes to: what Yahoo's client keeps, and an embedded database if none is named.
RUN useradd --system simulator && install -d -o simulator instance
USER simulator

ENV PORT=8000
EXPOSE 8000
HEALTHCHECK --start-period=30s CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=5)"]
CMD ["sh", "-c", "flask --app app db upgrade && exec gunicorn app:app --worker-class gthread --workers 2 --threads 64 --no-control-socket"]
