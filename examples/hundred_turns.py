"""A client that knows only OpenAI's API talks for a hundred turns, then asks for what it read before.

    titans serve titans-smollm2-135m --port 8000
    python examples/hundred_turns.py [URL [TURNS]]     # http://127.0.0.1:8000/v1, 100

Every request holds one new message and the name of a memory, never the past. Asked are six made-up facts:
right after the document, after the turns, and of a memory that has not read it.
"""

from __future__ import annotations

import sys

import openai

FACTS = {
    "The password to the north gate is": "hawthorn",
    "The password to the boathouse is": "marigold",
    "The number of Dr. Okafor's room is": "4172",
    "The number of the blue locker is": "60935",
    "The name of the captain's dog is": "Biscuit",
    "The letters are hidden under the": "piano",
}
DOCUMENT = "Notes of the harbour master.\n\n" + "".join(f"{start} {end}.\n" for start, end in FACTS.items())
SUBJECTS = ["bread", "rivers", "the moon", "chess", "rain", "trains", "bees", "paper", "winter", "salt"]
REQUESTS = ["Tell me about {}.", "Who likes {}?", "Write a line on {}.", "Why {}?", "What is new about {}?"]


class Conversation:
    """A memory on the server, named in each request."""

    def __init__(self, client: openai.OpenAI) -> None:
        self.client, self.model = client, client.models.list().data[0].id
        self.memory: str = client.post("/memories", cast_to=object, body={"model": self.model})["id"]  # type: ignore[index]
        self.sent = 0

    def read(self, text: str) -> None:
        self.client.post(f"/memories/{self.memory}/read", cast_to=object, body={"text": text})

    def say(self, message: str) -> str:
        answer = self.client.chat.completions.create(
            model=self.model, messages=[{"role": "user", "content": message}], max_tokens=8, temperature=0,
            extra_body={"memory": self.memory},
        )  # fmt: skip
        assert answer.usage
        self.sent = max(self.sent, answer.usage.prompt_tokens)
        return answer.choices[0].message.content or ""

    def recalled(self) -> int:
        """How many facts it continues as the document does; the questions leave no trace."""
        count = 0
        for start, end in FACTS.items():
            answer = self.client.completions.create(
                model=self.model, prompt=f"\n\n{start}", max_tokens=8, temperature=0,
                extra_body={"memory": self.memory, "remember": False},
            )  # fmt: skip
            text = answer.choices[0].text.strip()
            count += text.startswith(end)
            print(f"    {start} {text!r}")
        return count

    def tokens(self) -> int:
        return self.client.get(f"/memories/{self.memory}", cast_to=object)["tokens"]  # type: ignore[index]


def main(url: str = "http://127.0.0.1:8000/v1", turns: int = 100) -> None:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    conversation = Conversation(client)
    conversation.read(DOCUMENT)
    before = conversation.tokens()
    print(f"read {before} tokens; recalled at once: {conversation.recalled()} of {len(FACTS)}", flush=True)
    for turn in range(turns):
        message = REQUESTS[turn % len(REQUESTS)].format(SUBJECTS[turn * 7 // 5 % len(SUBJECTS)])
        answer = conversation.say(message)
        if turn % 25 == 0:
            print(f"    {turn}: {message} {answer!r}", flush=True)
    between = conversation.tokens() - before
    print(f"{turns} turns, {between:,} tokens, at most {conversation.sent} sent in one request")
    print(f"recalled after them: {conversation.recalled()} of {len(FACTS)}")
    print(f"recalled without the document: {Conversation(client).recalled()} of {len(FACTS)}")


if __name__ == "__main__":
    url, *rest = sys.argv[1:] or ["http://127.0.0.1:8000/v1"]
    main(url, *map(int, rest))
