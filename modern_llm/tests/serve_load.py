"""How many tokens a server writes, and how long its clients wait, with many of them at once:
`python -m modern_llm.tests.serve_load http://127.0.0.1:8000/ --model sft`.
"""

import argparse
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np


def post(address: str, path: str, body: object, timeout: float = 60) -> tuple[int, dict]:
    """Status and JSON of the answer to one request."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def load(address: str, model: str, clients: int = 32, each: int = 4, tokens: int = 64) -> dict:
    """Let clients ask for chat answers, `each` one after the other; what came of it, in tokens and
    seconds.
    """
    def client(number: int) -> list[tuple[float, int, int]]:
        found = []
        for turn in range(each):
            begun = time.perf_counter()
            status, answer = post(address, "/v1/chat/completions", {
                "model": model, "max_tokens": tokens, "seed": each * number + turn,
                "messages": [{"role": "user", "content": f"What is {number} plus {turn}?"}]})
            drawn = answer["usage"]["completion_tokens"] if status == 200 else 0
            found.append((time.perf_counter() - begun, drawn, status))
        return found

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [one for found in pool.map(client, range(clients)) for one in found]
    whole = time.perf_counter() - begun
    waits = [wait for wait, _, _ in answers]
    drawn = sum(tokens for _, tokens, _ in answers)
    return {"requests": len(answers), "failed": sum(status != 200 for _, _, status in answers),
            "tokens": drawn, "seconds": whole, "tokens_per_second": drawn / whole,
            "p50_seconds": float(np.quantile(waits, 0.5)),
            "p95_seconds": float(np.quantile(waits, 0.95))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--model", default="sft")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    print(json.dumps(load(**vars(parser.parse_args())), indent=2))
