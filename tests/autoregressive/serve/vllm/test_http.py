"""The server with vLLM behind it: pictures, refusals, numbers."""
import subprocess
import sys

import httpx
import pytest

from tests.autoregressive.serve.models import save_models
from tests.conftest import ROOT


@pytest.mark.processes
def test_the_server_draws_with_vllm(tmp_path):
    server = subprocess.Popen([sys.executable, str(ROOT / "autoregressive/serve/api.py"), "--port", "0", "--backend",
                               "vllm", "--models", str(save_models(tmp_path)), "--slots", "4"], stdout=subprocess.PIPE,
                              text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("ready: "))
        with httpx.Client(base_url=line.split()[1].split("/v1/")[0], timeout=120) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["gpt", "text"]  # no ARPG
            asked = {"model": "gpt", "class": 1, "n": 6, "seed": 3}
            first, again = (client.post("/v1/images/generations", json=asked).json()["data"] for _ in range(2))
            assert first == again and len({datum["b64_json"] for datum in first}) == 6
            alone = client.post("/v1/images/generations", json=asked | {"n": 1, "index": 4}).json()["data"]
            assert alone == first[4:5]
            text = client.post("/v1/images/generations", json={"model": "text", "prompt": "a red cat", "seed": 1})
            assert text.status_code == 200
            refused = client.post("/v1/images/generations", json={"model": "gpt", "temperature": 3})
            assert refused.status_code == 400 and "vLLM" in refused.json()["error"]["message"]
            numbers = client.get("/metrics").text
            assert 'llamagen_images_total{model="gpt"} 13.0' in numbers and "llamagen_images_decoding 0.0" in numbers
    finally:
        server.terminate()
        assert server.wait(60) == 0
