"""The production engine: a client of a vLLM server, on this machine or another that sees the same adapter folders.

We template and tokenise, the server gets token ids, so that what trains is what serves. An adapter's id is its name on
the server and is never given to other weights: servers keep prefixes in a cache under the name alone. The invariant: a
call ends on the adapter it started with, also when it is unloaded meanwhile or the server is started anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, RLock
from typing import Any, TypeVar

from ..errors import ServingError, SettingsError
from ..settings import ServingSettings, without_user
from . import parity
from .base import VLLM_IGNORES, base_id, has_weights_vllm_ignores, load_tokenizer, locate
from .chat import Ids, answer_ids, prompt_ids
from .engine import MANIFEST, Limit, Pieces, Prompt, Sampling, Score, of_another_base, require_pairs, room_for_prompt

try:
    import httpx
except ModuleNotFoundError as error:
    raise ServingError(f"the vllm engine needs {error.name}; run `pip install 'nightschool[serve]'`") from error

T = TypeVar("T")
log = logging.getLogger("nightschool")
DEFAULT, NO_LIMIT = Sampling(), Limit()
KEY = "VLLM_API_KEY"  # of the environment, as the server itself reads it
WHOLE = ("stop", "length")  # why an answer may end
CALLS = 64  # at a time; the server batches them
PLAIN = {"repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}  # and not what the checkpoint has for its defaults


class VLLMEngine:
    """`settings.url` answers with the base `settings.base`, whose tokenizer is read from here."""

    def __init__(self, settings: ServingSettings, client: httpx.Client | None = None) -> None:
        limits = httpx.Limits(max_connections=CALLS)
        url = settings.url.rstrip("/").removesuffix("/v1")  # as others write it
        self._url = without_user(url)  # for messages
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):  # an error of httpx would show it
            raise SettingsError(f"{KEY} has characters that no key of a server can have")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = _address(url)  # without name and password, as httpx logs it
        # no proxy of the environment: what people say goes to this address and nowhere else
        self._client = client or httpx.Client(
            base_url=address.copy_with(userinfo=b""),
            auth=(address.username, address.password) if address.userinfo else None,
            headers=headers,
            timeout=settings.timeout_seconds or None,
            limits=limits,
            trust_env=False,
        )
        self._tolerance = settings.parity_tolerance
        self._tokenizer = load_tokenizer(settings.base)
        self._base_id = base_id(settings.base)
        try:
            self._model, self._context = self._served_base(settings.base)
        except BaseException:
            self._client.close()
            raise
        self._paths: dict[str, Path] = {}  # adapter id → its folder; what should be loaded
        self._leases: Counter[str] = Counter()
        self._abandoned: deque[ExitStack] = deque()  # leases of streams that nobody read to their end
        self._leaving: set[str] = set()
        self._lock = RLock()  # of the paths, leases and those that leave, never held while the server is asked
        self._checks: dict[str, Event] = {}  # of adapters that were loaded again and are being checked
        self._refused: set[str] = set()  # of those
        self._changing = RLock()  # one load or unload at a time

    def close(self) -> None:
        """What was left to the next call is made good before. What is asked later is a ServingError."""
        self._drop_left()
        self._client.close()

    @property
    def base_id(self) -> str:
        return self._base_id

    # -- answering ---

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapter: str | None = None,
        sampling: Sampling = DEFAULT,
        cancel: Event | None = None,
    ) -> list[str]:
        """One answer a prompt, in order. Those that another thread may `cancel` come in pieces, so that the server
        ends them, too, with the next one; while it is silent they wait for it."""
        limit = Limit(sampling.timeout_s, cancel)
        bodies = [self._asked(prompt, sampling, row) for row, prompt in enumerate(prompts)]
        with self._lease(adapter) as model:
            return self._in_parallel(lambda body: self._whole(model, body, limit), bodies)

    def _whole(self, model: str, body: dict[str, Any], limit: Limit) -> str:
        if limit.cancel:
            return "".join(self._pieces({**body, "model": model, "stream": True}, limit))
        return str(self._complete(model, body, limit)["text"])

    def stream(self, prompt: Prompt, *, adapter: str | None = None, sampling: Sampling = DEFAULT) -> Pieces:
        """The pieces of what `generate` would return. Closing it ends the request on the server."""
        limit = Limit(sampling.timeout_s)
        body = {**self._asked(prompt, sampling, 0), "stream": True}
        lease = ExitStack()
        pieces = self._streamed({**body, "model": lease.enter_context(self._lease(adapter))}, lease, limit)
        # the collector, which comes before the generator ends, may find one that was left where a lock is held
        weakref.finalize(pieces, lambda: self._abandoned.append(lease.pop_all()))
        return pieces

    def _streamed(self, body: dict[str, Any], lease: ExitStack, limit: Limit) -> Pieces:
        with ExitStack() as changing, lease:
            try:
                yield from self._pieces(body, limit)
            except GeneratorExit:  # who closes it may have been found by the collector, and so waits for nobody
                if self._changing.acquire(blocking=False):
                    changing.callback(self._changing.release)
                else:
                    self._abandoned.append(lease.pop_all())
                raise

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        *,
        adapter: str | None = None,
        timeout_s: float = 0.0,
        cancel: Event | None = None,
    ) -> list[Score]:
        """Log-probabilities of `answers`, each with its end of turn, given their prompts. What the server has begun
        when `cancel` is set is waited for."""
        limit = Limit(timeout_s, cancel)
        require_pairs(prompts, answers)
        tails = [answer_ids(self._tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]
        # the server draws one token more than it is asked to score
        rows = [(self._prompt(prompt, len(tail) + 1), tail) for prompt, tail in zip(prompts, tails, strict=True)]
        with self._lease(adapter) as model:
            return self._in_parallel(lambda row: self._score_one(model, row[0], row[1], limit), rows)

    def _score_one(self, model: str, head: Ids, tail: Ids, limit: Limit) -> Score:
        body = {"prompt": [*head, *tail], "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choice = self._complete(model, body, limit, checks=False)
        try:
            at = zip(tail, choice["prompt_logprobs"][len(head) :], strict=True)
            return Score(tuple(float(options[str(token)]["logprob"]) for token, options in at))
        except (KeyError, TypeError, ValueError) as error:
            raise ServingError(f"{self._url} gives no log-probabilities of a prompt's tokens: {error!r}") from error

    def _asked(self, prompt: Prompt, sampling: Sampling, row: int) -> dict[str, Any]:
        return {
            "prompt": list(self._prompt(prompt, sampling.max_tokens)),
            "max_tokens": sampling.max_tokens,
            "temperature": max(0.0, sampling.temperature),
            "top_p": sampling.top_p,
            "seed": sampling.seed * 1_000_003 + row,  # rows of one call draw differently
            "stop": list(sampling.stop),
            **PLAIN,
        }

    def _prompt(self, prompt: Prompt, reserved: int) -> Ids:
        return prompt_ids(self._tokenizer, prompt, room_for_prompt(self._context, reserved))

    # -- adapters ---

    def adapters(self) -> list[str]:
        """What this engine has loaded and not unloaded."""
        with self._lock:
            return [adapter_id for adapter_id in self._paths if adapter_id not in self._leaving]

    def load(self, adapter_id: str, path: Path) -> None:
        """Have the server load the adapter in `path`, which it must see under the same name."""
        with self._changing:
            with self._lock:
                self._leaving.discard(adapter_id)
                self._refused.discard(adapter_id)
                if adapter_id in self._paths:
                    return
            self._check(adapter_id, path)
            self._load(adapter_id, path)
            with self._lock:
                self._paths[adapter_id] = path
        self._drop_left()

    def unload(self, adapter_id: str) -> None:
        """Answer no new call with it; the server drops it when the running ones have ended."""
        self._give_back()
        with self._lock:
            self._require(adapter_id)
            self._leaving.add(adapter_id)
        self._drop_unused(adapter_id)

    def discard(self, adapter_ids: Collection[str]) -> None:
        """Have the server drop what other processes of ours left in it."""
        with self._changing:
            for adapter_id in sorted((self._listed().keys() & set(adapter_ids)) - set(self.adapters())):
                self._unload(adapter_id)

    @contextmanager
    def _lease(self, adapter: str | None) -> Iterator[str]:
        self._give_back()
        if adapter is None:
            yield self._model
            return
        with self._lock:
            self._require(adapter)
            self._leases[adapter] += 1
        try:
            yield adapter
        finally:
            with self._lock:
                self._leases[adapter] -= 1
            try:
                self._drop_unused(adapter)
            except ServingError as error:  # an answer that is whole is not lost by it
                log.warning("adapter %s could not be unloaded: %s", adapter, error)

    def _give_back(self) -> None:
        """What streams had that were left before their end."""
        while self._abandoned:
            with suppress(IndexError):  # another thread was first
                self._abandoned.popleft().close()

    def _require(self, adapter_id: str) -> None:
        if adapter_id not in self.adapters():
            raise ServingError(f"adapter {adapter_id} is not loaded; loaded: {', '.join(self.adapters()) or 'none'}")

    def _drop_unused(self, adapter_id: str) -> None:
        with self._lock:
            if adapter_id not in self._leaving:
                return
        with self._changing:
            with self._lock:
                if adapter_id not in self._leaving or self._leases[adapter_id]:
                    return
            self._unload(adapter_id)
            with self._lock:
                self._leaving.discard(adapter_id)
                del self._paths[adapter_id]

    def _unload(self, adapter_id: str) -> None:
        self._send("/v1/unload_lora_adapter", {"lora_name": adapter_id}, missing_is_fine=True)

    def _drop_left(self) -> None:
        """What the server did not unload when it was asked to, or could not be asked to."""
        self._give_back()
        with self._lock:
            left = list(self._leaving)
        for adapter_id in left:
            try:
                self._drop_unused(adapter_id)
            except ServingError as error:
                log.warning("adapter %s could not be unloaded: %s", adapter_id, error)

    def _check(self, adapter_id: str, path: Path) -> None:
        made_for = _manifest(adapter_id, path).get("base_id", self._base_id)
        if made_for != self._base_id:
            raise ServingError(of_another_base(adapter_id, made_for, self._base_id))
        if has_weights_vllm_ignores(path):
            raise ServingError(
                f"adapter {adapter_id} has weights on {VLLM_IGNORES}, which a vLLM server passes by without a word; run"
                " `nightschool night` to train one without them, or set serving.engine to local"
            )

    def _load(self, adapter_id: str, path: Path) -> None:
        if adapter_id in self._listed():
            return  # another process of ours was first; a name means the same weights everywhere
        body = {"lora_name": adapter_id, "lora_path": str(path.resolve())}
        try:
            self._send("/v1/load_lora_adapter", body)
        except ServingError as error:
            if adapter_id not in self._listed():
                raise ServingError(
                    f"adapter {adapter_id}: the server cannot load {path}: {error}; it must see that folder, and be"
                    " started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, as `nightschool serve` does"
                ) from error

    # -- the server ---

    def _served_base(self, base: str) -> tuple[str, int]:
        """Its name on the server and the context it was started with."""
        wanted = {base, str(locate(base)), str(locate(base).resolve())}
        for name, model in self._listed().items():
            if not model.get("parent") and wanted & {name, str(model.get("root"))}:
                return name, self._context_of(model)
        served = ", ".join(name for name, model in self._listed().items() if not model.get("parent"))
        raise ServingError(
            f"{self._url} serves {served}, not serving.base = {base}; start it with `nightschool serve`, or set"
            " serving.base to what it serves"
        )

    def _context_of(self, model: dict[str, Any]) -> int:
        try:
            return int(model["max_model_len"])
        except (KeyError, TypeError, ValueError) as error:
            raise ServingError(f"{self._url}/v1/models does not answer as a vLLM server: {error!r}") from error

    def _listed(self, limit: Limit = NO_LIMIT) -> dict[str, Any]:
        response = self._answered("GET", "/v1/models", limit=limit)
        try:
            return {model["id"]: model for model in response.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ServingError(f"{self._url}/v1/models does not answer as a vLLM server: {error!r}") from error

    def _complete(
        self, model: str, body: dict[str, Any], limit: Limit = NO_LIMIT, checks: bool = True
    ) -> dict[str, Any]:
        """The one choice of a completion. A server that was started anew is given the adapter again.

        What an adapter says while it is checked counts if it passes; the check itself (`checks` False) waits for none.
        """
        asked = {**body, "model": model}
        response = self._answered("POST", "/v1/completions", asked, accepted=(200, 404), limit=limit)
        if response.status_code == 404:
            self._load_again(model, limit)
            response = self._answered("POST", "/v1/completions", asked, limit=limit)
        if checks:
            self._await_check(model, limit)
        try:
            choice: dict[str, Any] = response.json()["choices"][0]
            text, reason = choice["text"], choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ServingError(f"{self._url} does not answer as a vLLM server: {error!r}") from error
        if not isinstance(text, str) or reason not in WHOLE:
            raise ServingError(f"{self._url} broke the answer off: finish_reason {reason!r}; ask again")
        return choice

    def _load_again(self, model: str, limit: Limit) -> None:
        """What a server that was started anew lacks; whoever loads it sees to it that it answers as it should."""
        with self._changing_within(limit):
            with self._lock:
                path = self._paths.get(model)
            if path is None or model in self._listed(limit):
                return
            self._checks[model] = done = Event()
            try:
                self._load(model, path)
            except BaseException:
                self._settle(model, done)
                raise
        try:
            self._check_again(model, path)
        finally:
            self._settle(model, done)

    def _check_again(self, model: str, path: Path) -> None:
        recorded = _manifest(model, path).get("details", {}).get("parity")
        if recorded and model in self.adapters():
            try:
                parity.check(self, model, recorded, self._tolerance)
            except ServingError:
                self._refused.add(model)
                self.unload(model)
                raise

    def _settle(self, model: str, done: Event) -> None:
        self._checks.pop(model, None)
        done.set()

    def _await_check(self, model: str, limit: Limit) -> None:
        """Until another call has seen to it that the adapter answers as it should."""
        if check := self._checks.get(model):
            limit.wait(check.wait)
        if model in self._refused:
            raise ServingError(f"adapter {model} was refused by its check after the server was started anew")

    @contextmanager
    def _changing_within(self, limit: Limit) -> Iterator[None]:
        limit.wait(lambda seconds: self._changing.acquire(timeout=seconds))
        try:
            yield
        finally:
            self._changing.release()

    def _pieces(self, body: dict[str, Any], limit: Limit) -> Pieces:
        """As `_complete` answers: what the server lacks is loaded again, and nothing comes of an adapter that is being
        checked. The check needs a connection, so the first try does not hold one until it has ended.
        """
        model: str = body["model"]
        for first in (True, False):
            self._await_check(model, limit)
            stream = self._client.stream("POST", "/v1/completions", json=body, timeout=self._seconds(limit))
            with self._translated(limit), stream as response:
                if not first or (response.status_code != 404 and model not in self._checks):
                    self._await_check(model, limit)
                    yield from self._read(response, limit)
                    return
            self._load_again(model, limit)

    def _read(self, response: httpx.Response, limit: Limit) -> Pieces:
        if response.status_code != 200:
            response.read()
            raise ServingError(f"{self._url}: {_reason(response)}")
        ended = False
        for line in _lines(response.iter_text()):
            limit.left()
            field, _, data = line.partition(":")  # a line without a field is a comment
            if field != "data":
                continue
            piece, last = ("", True) if data.strip() == "[DONE]" else self._piece(data)
            if piece:
                yield piece
            ended = ended or last
        if not ended:
            raise ServingError(f"{self._url}: the answer broke off before its end; ask again")

    def _piece(self, data: str) -> tuple[str, bool]:
        """What a chunk says, and whether it is the last."""
        try:
            choices = json.loads(data)["choices"]  # none in a chunk that tells the usage
            piece, reason = (choices[0]["text"], choices[0].get("finish_reason")) if choices else ("", None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServingError(f"{self._url}: the answer broke off: {_complaint(data)}") from error
        if not isinstance(piece, str) or reason not in (None, *WHOLE):
            raise ServingError(f"{self._url}: the answer broke off: finish_reason {reason!r}; ask again")
        return piece, reason is not None

    def _send(self, path: str, body: dict[str, Any], *, missing_is_fine: bool = False) -> None:
        self._answered("POST", path, body, accepted=(200, 404) if missing_is_fine else (200,))

    def _answered(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        accepted: Sequence[int] = (200,),
        limit: Limit = NO_LIMIT,
    ) -> httpx.Response:
        with self._translated(limit):
            response = self._client.request(method, path, json=body, timeout=self._seconds(limit))
        limit.left()  # the wait for a connection and for the answer have the limit each
        if response.status_code not in accepted:
            raise ServingError(f"{self._url}{path} refused: {_reason(response)}")
        return response

    def _seconds(self, limit: Limit) -> httpx.Timeout:
        left = limit.left()
        return self._client.timeout if left is None else httpx.Timeout(left)

    @contextmanager
    def _translated(self, limit: Limit) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException as error:
            limit.left()
            if limit.timeout_s:
                raise limit.missed() from error
            seconds = self._client.timeout.read
            raise ServingError(f"{self._url} gave no answer in {seconds} s; see serving.timeout_seconds") from error
        except httpx.HTTPError as error:
            raise ServingError(f"{self._url} cannot be reached ({error}); start it with `nightschool serve`") from error
        except RuntimeError as error:
            if not self._client.is_closed:
                raise
            raise ServingError("the engine is closed; open another") from error

    def _in_parallel(self, call: Callable[[Any], T], rows: Sequence[Any]) -> list[T]:
        if len(rows) < 2:
            return [call(row) for row in rows]
        with ThreadPoolExecutor(min(CALLS, len(rows))) as pool:
            return list(pool.map(call, rows))


def _address(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL as error:
        raise SettingsError(f"serving.url is {without_user(url)!r}; it is http://HOST:PORT") from error


def _manifest(adapter_id: str, path: Path) -> dict[str, Any]:
    """Empty where the adapter has none, as one that was trained elsewhere."""
    file = path / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ServingError(f"adapter {adapter_id}: {file} is damaged: {error}") from error
    if not isinstance(found, dict) or (found and "base_id" not in found):
        raise ServingError(f"adapter {adapter_id}: {file} is damaged: it names no base")
    return found


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Of a stream of events. httpx parts them at U+2028 and its like as well, which an answer may hold."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
    yield rest


def _complaint(data: str) -> str:
    """What the server says of an error in a stream; never a piece of the answer."""
    try:
        return str(json.loads(data)["error"])[:200]
    except (ValueError, KeyError, TypeError):
        return f"{len(data)} characters that are no choice of a completion"


_IDS_RE = re.compile(r"\[\d+(?:,\s*\d+){3,}(?:,?\s*\.\.\.)?\]?")


def _reason(response: httpx.Response) -> str:
    if response.status_code == 401:
        return f"it wants a key; set {KEY} to the one it was started with"
    try:
        found = response.json()
        said = str(found.get("error", found).get("message", found))
        return _IDS_RE.sub("[…]", said)[:200]  # the ids of a prompt are its words
    except (ValueError, AttributeError):
        return f"status {response.status_code}"
