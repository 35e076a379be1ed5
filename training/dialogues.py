"""Generated dialogues for the pocket model, in the project's own prompt format.

Everything random comes from the `random.Random` handed in, so that a seed gives the same dialogues.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentd.engine.prompt import Called, Responded, Said, Turn
from training import phrases

if TYPE_CHECKING:
    from random import Random

WORDS = """
able about above account across after again agenda air alarm album all almost alpha also always amber among anchor animal answer
apple april archive area arm around arrow artist august aunt autumn avenue away baby back bag bake ball banana band bank barn
basil basket bath beach bean bear beauty bed bee bell best better bicycle big bike bill bird birthday black blanket blue board
boat body book boot border bottle bottom bowl box boy branch bread break breakfast bridge bright brother brown brush bucket
budget build bus business butter button cabin cable cake calendar camera camp candle captain car card care carpet carrot castle
cat cedar center chain chair chalk change cheese cherry chess chest chicken child choir church cinema circle city class clean
clear clock cloud coast coat coffee coin cold color comb common concert cook cool copper corn corner cotton country cousin cow
cream creek crop cross crowd crown cup curtain daily dance dark daughter dawn day december deep deer dentist desk dinner doctor
dog doll door double down draft dream dress drink drive drum duck dust early earth east easy egg eight electric elephant
engine evening event every exam extra face factory family farm fast father feather february fence field film finger fire first
fish five flag flat floor flower fly fog follow food foot forest fork four fox fresh friday friend fruit garage garden gate
gentle gift girl glass globe glove goat gold good grain grandma grape grass green grey ground group guest guitar hair half hall
hammer hand happy harbor hat heart heater heavy hen herb high hill history hobby holiday home honey horse hospital hotel hour
house ice idea inch invoice iron island jacket january jar jelly job journey juice july june jungle keep kettle key kitchen
kite knife lake lamp land large late laundry leaf lemon lesson letter level library light lime line lion list little log long
lunch machine magic mail main many map march market master may meadow meal measure meat meeting melon memo message metal middle
milk mill minute mirror monday money month moon morning mother motor mountain mouse mouth movie music name narrow nation nature
near neck needle nest never new news next nice night nine north nose note november number nurse oak ocean october office oil old
olive onion open orange orchard order oven over owner packet page paint pair palace paper parade parcel parent park party pasta
path peach peanut pear pearl pencil people pepper phone photo piano picture pie pig pillow pilot pine pink pipe pizza place plan
plant plate play plum pocket poem point pond pool post pot potato powder present press price prince print prize profit project
pump purple queen question quick quiet rabbit race radio rain recipe record red rent repair report rest rice ring river road
robot rock roof room rope rose round route row salad salt sand saturday sauce school science sea season second seed september
seven shed sheep sheet shelf ship shirt shoe shop short silver simple sister six sketch sky sleep slow small smoke snow soap
sock soft song soup south space spare special spice spoon sport spring square stable stage stamp star station stone store storm
story street strong studio sugar summary summer sun sunday supper sweet swim table tank task taxi tea teacher team ten tennis
tent test theater three thursday ticket tiger time toast today tomato tomorrow tool top towel tower town toy track trade train
travel tree trip truck tuesday tulip turtle twelve two uncle under vacation valley vase violin visit voice wagon wall walnut
warm wash watch water wave weather wednesday week west wheat wheel white wide wild wind window wine winter wire wolf wonder wood
wool work world yard year yellow yoga zebra zero
""".split()
HELD_OUT_WORDS = """
almond badge balcony barley beaver blossom bonfire bracelet cactus canvas cello cinnamon clover coral crystal diary dolphin
eagle falcon feast festival galaxy ginger glacier hazel helmet ivory jasmine jigsaw kayak kiwi ladder lantern lavender lizard
magnet mango maple marble meteor mustard nectar oyster paddle panda parrot pebble picnic pigeon planet plaza puzzle quilt radish
raven ribbon saddle saffron scarf shadow silk sparrow spinach squash stadium sunset syrup tablet thunder trumpet tundra vanilla
velvet village violet volcano waffle whisper willow wizard zipper
""".split()
EXTENSIONS = [".txt", ".txt", ".md", ".md", ".log", ".csv", ".json", ".py", ".toml", ".conf", ".yaml", ".html", ".sh"]
QUESTIONS = {"what", "how", "which", "is", "are", "do", "does", "where", "who", "what's", "I", "the"}
ERRORS = ["permission denied", "timed out", "no space left", "not a text file", "the daemon is stopping", "too large"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One user request and what the pocket model should do about it. `call` is None where no tool fits."""

    user: str
    call: Called | None
    result: dict[str, Any]
    answer: str

    def turn(self) -> Turn:
        if self.call is None:
            return Turn(self.user, (Said(self.answer),))
        return Turn(self.user, (self.call, Responded(self.call.tool, self.result), Said(self.answer)))


class Dialogues:
    """Samples from a seeded generator; `held_out` gives phrasings and words that training never shows."""

    def __init__(self, random: Random, *, held_out: bool = False) -> None:
        self._r = random
        self._held_out = held_out
        self._phrases = phrases.HELD_OUT if held_out else phrases.TRAIN
        self._words = HELD_OUT_WORDS if held_out else WORDS

    def word(self) -> str:
        r = self._r
        if r.random() < 0.25:
            return "".join(r.choice(string.ascii_lowercase) for _ in range(r.randint(2, 8)))
        word = r.choice(self._words)
        return word + r.choice("sd") if r.random() < 0.1 else word

    def file_name(self) -> str:
        r = self._r
        name = self.word()
        if r.random() < 0.3:
            name += r.choice("-_") + self.word()
        if r.random() < 0.2:
            name += str(r.randint(0, 2030))
        if r.random() < 0.08:
            name = name.capitalize() if r.random() < 0.5 else name.upper()
        return name + r.choice(EXTENSIONS)

    def _folder_name(self) -> str:
        name = self.word()
        if self._r.random() < 0.2:
            name += self._r.choice("-_") + self.word()
        if self._r.random() < 0.1:
            name += str(self._r.randint(0, 2030))
        return name.capitalize() if self._r.random() < 0.1 else name

    def folder(self) -> str:
        r = self._r
        start = r.choice(["", "", "", "", "~/", "/home/pi/", "/tmp/", "/var/log/", "/etc/", "./", "/srv/", "/"])
        folder = start + "/".join(self._folder_name() for _ in range(r.choice([1, 1, 1, 2, 2, 3])))
        if r.random() < 0.04:
            return r.choice([".", "~", "/", "/tmp", "/etc", "/var/log"])
        return folder + "/" if r.random() < 0.1 else folder

    def file(self) -> str:
        r = self._r
        if r.random() < 0.45:
            return self.file_name()
        if r.random() < 0.2:
            return r.choice(["~/", "/tmp/", "/etc/", "./", "../"]) + self.file_name()
        return self.folder().rstrip("/") + "/" + self.file_name()

    def text(self, longest: int = 7) -> str:
        r = self._r
        words = [self.word() for _ in range(r.randint(1, longest))]
        if r.random() < 0.15:
            words.insert(r.randint(0, len(words)), str(r.randint(0, 2030)))
        if r.random() < 0.06:
            words.append(f"at {r.randint(0, 23)}:{r.randint(0, 59):02d}")
        if r.random() < 0.05:
            words = [w.capitalize() for w in words]
        text = " ".join(words)
        if r.random() < 0.1:
            text = text.replace(" ", ", ", 1)
        text = text[0].upper() + text[1:] if r.random() < 0.2 else text
        return text + r.choice("!.?") if r.random() < 0.12 else text

    def _lines(self) -> str:
        """The text of a file. Files of several lines are harder: training has more of them than the evaluation."""
        lines = self._r.choice([1, 1, 1, 2, 3] if self._held_out else [1, 1, 2, 3, 3, 4, 5])
        return "\n".join(self.text(7 if lines < 3 else 3) for _ in range(lines))

    def sample(self) -> Sample:
        r = self._r
        roll = r.random()
        if roll < 0.05:
            return self._no_tool()
        if roll < 0.09:
            user, answer = r.choice(list(phrases.CHAT.items()))
            return Sample(r.choice([user, user.capitalize(), user + "!", user + "?"]), None, {}, answer)
        tool = r.choice(list(self._phrases)) if r.random() < 0.5 else r.choice([t for t in self._phrases if t < "g"])
        sample = self._tool(tool)
        if r.random() < 0.12 and sample.call:
            error = self._error(sample.call)
            return Sample(sample.user, sample.call, {"error": error}, f"That did not work: {error}.")
        return sample

    def _no_tool(self) -> Sample:
        pattern = self._r.choice(phrases.NO_TOOL_HELD_OUT if self._held_out else phrases.NO_TOOL)
        while "{w}" in pattern:
            pattern = pattern.replace("{w}", self.word(), 1)
        while "{n}" in pattern:
            pattern = pattern.replace("{n}", str(self._r.randint(2, 99)), 1)
        return Sample(self._polite(pattern), None, {}, "I have no tool for that.")

    def _tool(self, tool: str) -> Sample:
        phrase = self._r.choice(self._phrases[tool])
        if tool.startswith("system."):
            result, answer = self._reading(tool)
            return Sample(self._polite(phrase), Called(tool, {}), result, answer)
        folder = tool in ("files.list", "files.search") or "folder" in phrase
        arguments = {"path": self.folder() if folder else self.file()}
        if tool == "files.search" and "files" not in phrase and "folder" not in phrase and self._r.random() < 0.3:
            arguments["path"] = self.file()
        if "{t}" in phrase:
            arguments["text"] = self.text(2).rstrip("!.?") if tool == "files.search" else self.text()
        if "{to}" in phrase:
            arguments["to"] = self.file()
        filled = phrase.replace("{p}", self._maybe_quoted(arguments["path"], 0.1))
        filled = filled.replace("{to}", self._maybe_quoted(arguments.get("to", ""), 0.1))
        user = self._polite(filled, dotted=not filled.endswith("{t}"))
        # A text without quotes is the harder case: training has more of it than people's requests.
        user = user.replace("{t}", self._maybe_quoted(arguments.get("text", ""), 0.6 if self._held_out else 0.4))
        result, answer = self._outcome(tool, arguments)
        return Sample(user, Called(tool, arguments), result, answer)

    def _outcome(self, tool: str, a: dict[str, str]) -> tuple[dict[str, Any], str]:
        """What the tool gives back (as `tools/files/run.py` does) and the answer to it."""
        r, path = self._r, a["path"]
        match tool:
            case "files.read":
                text = "" if r.random() < 0.06 else self._lines()
                shown = text + "\n" if text and r.random() < 0.7 else text
                return {"text": shown}, f"{path} says: {text}" if text else f"{path} is empty."
            case "files.list":
                entries = sorted(
                    self._folder_name() + "/" if r.random() < 0.2 else self.file_name()
                    for _ in range(r.choice([0, 1, 2, 3, 4, 5]))
                )
                return {"count": len(entries), "entries": entries}, listed(path, entries)
            case "files.search":
                matches = [f"{self.file_name()}:{r.randint(1, 99)}: {self.text(4)}" for _ in range(r.choice([0, 1, 1, 2, 3]))]
                return {"count": len(matches), "matches": matches}, found(a["text"], path, matches)
            case "files.write":
                return {"bytes": len(a["text"].encode()) + 1}, f"Wrote {path}."
            case "files.append":
                return {"bytes": len(a["text"].encode()) + 1}, f"Added the line to {path}."
            case "files.move":
                return {"moved": True}, f"Moved {path} to {a['to']}."
            case _:
                return {"deleted": True}, f"Deleted {path}."

    def _reading(self, tool: str) -> tuple[dict[str, Any], str]:
        r = self._r
        match tool:
            case "system.battery":
                percent, status = r.randint(0, 100), r.choice(["charging", "discharging", "full", "not charging"])
                return {"percent": percent, "status": status}, f"The battery is at {percent} %, {status}."
            case "system.temperature":
                celsius = r.randint(150, 950) / 10
                return {"celsius": celsius}, f"The temperature is {celsius} C."
            case "system.memory":
                total = r.choice([r.randint(400, 9000), r.randint(9000, 64000)])
                free = r.randint(20, total)
                return {"free_mb": free, "total_mb": total}, f"{free} MB of {total} MB memory are free."
            case "system.disk":
                total_gb = r.randint(20, 9999) / 10
                free_gb = r.randint(0, int(total_gb * 10)) / 10
                return {"free_gb": free_gb, "total_gb": total_gb}, f"{free_gb} GB of {total_gb} GB disk are free."
            case _:
                date = f"{r.randint(2024, 2039)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"
                time = f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"
                return {"date": date, "time": time}, f"It is {time} on {date}."

    def _error(self, call: Called) -> str:
        """Errors in the words of the daemon and of the tools."""
        r = self._r
        path = call.arguments.get("path")
        if path is None:
            return r.choice([*ERRORS, "no battery found", "no sensor found", "denied: no grant covers this call"])
        path = r.choice([path, f"/home/{self.word()}/{path}"]) if path[0] not in "/~." else path
        kind = "read" if call.tool in ("files.read", "files.list", "files.search") else "write"
        return r.choice(
            [
                f"denied: no grant covers {kind}:{path}",
                f"denied by the rule for {kind}:{path}",
                f"{path} does not exist",
                f"{path} is a folder",
                f"{path} is not a folder",
                r.choice(ERRORS),
            ]
        )

    def _maybe_quoted(self, text: str, share: float) -> str:
        if self._r.random() < share:
            quote = self._r.choice("\"'")
            return text if quote in text else quote + text + quote
        return text

    def _polite(self, request: str, *, dotted: bool = True) -> str:
        r = self._r
        before = r.choice(phrases.BEFORE)
        question = request.split(maxsplit=1)[0] in QUESTIONS
        if question and before not in ("", "hey, ", "now ", "ok, ", "then "):
            before = ""
        text = before + request
        if r.random() < 0.25 and dotted:
            text += r.choice(phrases.AFTER)
        if r.random() < 0.5:
            text = text[0].upper() + text[1:]
        if dotted and (before in ("can you ", "could you ", "would you ") or question) and r.random() < 0.6:
            return text + "?"
        return text + "." if dotted and r.random() < 0.25 else text


def listed(path: str, entries: list[str]) -> str:
    if not entries:
        return f"{path} is empty."
    return f"{path} has {len(entries)} {'entry' if len(entries) == 1 else 'entries'}: {', '.join(entries)}"


def found(text: str, path: str, matches: list[str]) -> str:
    if not matches:
        return f"No match for {text} in {path}."
    return f"Found {len(matches)} {'match' if len(matches) == 1 else 'matches'}: {'; '.join(matches)}"
