"""Seven sets of emoji, each drawn by other people: where each comes from, and how a drawing is found in it.

    noto                Google, Noto Emoji (Apache-2.0)
    twemoji             Twitter and others, Twemoji (CC BY 4.0)
    openmoji            students and teachers of HfG Schwäbisch Gmünd, OpenMoji (CC BY-SA 4.0)
    fluent-emoji-flat   Microsoft, Fluent Emoji, flat (MIT)
    fxemoji             Mozilla, Firefox OS Emoji (Apache-2.0)
    emojione-v1         Emoji One, version 1 (CC BY-SA 4.0)
    emojione            Emoji One, version 2 (CC BY 4.0)

Each is a package @iconify-json/STYLE of npm: a JSON file of SVG drawings by name (iconify.design, "IconifyJSON").
The first four list the code points of their drawings. The others have names alone: a drawing is taken where its name is
the emoji's, in CLDR or in Unicode, or where NAMES below says so. That list was written by hand, and all drawings
were looked at beside those of noto. So each of these three misses some concepts.
"""

import json
import re
from functools import lru_cache
from typing import Any

from nondual.store import Package, read


def _package(style: str, version: str, size: int, sha256: str, icons: str, chars: str, info: str) -> Package:
    files = {"icons.json": icons, "chars.json": chars, "info.json": info}
    name = f"@iconify-json/{style}"
    return Package(name, version, sha256, "package/", files, holds="drawings", size=size, source="npm")


_NO_CHARS = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"  # the sha256 of "{}" and a new line

PACKAGES: dict[str, Package] = {
    "noto": _package(
        "noto",
        "1.2.9",
        3_102_958,
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "9eac6ef4e7ec122b6f0e7ac281d61008afdbc720d0ce861e398b939daaa347c6",
        "91485653ca890bff640f2a6c2d7be62d625a90527b6b4d816b41593675bf5c8f",
        "ecc8c96b156cdd30d682a8518f662a2693f1b0e63b14e89c5e8d4e7990b8cb9c",
    ),
    "twemoji": _package(
        "twemoji",
        "1.2.5",
        1_555_888,
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "5d5d820790565b764f2728675d487c9ee4c1fc83916d8567d5aca8ba7527c242",
        "8e6a83d5a3ac185b2446154b9c4ee07c983bd4a5b2a21aa4b9ff04af9831eefe",
        "9a7a0a6533a8a43588a463bfa88282620e560eeb2c1f1980ce30ada153358642",
    ),
    "openmoji": _package(
        "openmoji",
        "1.2.29",
        1_264_633,
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "7075331faab544067dbff4236471dd378bb5410aa05799a8a343c9ebf5c5984c",
        "8583c4c65723c22c043a50a27038c43d3d12de336ad409872b23356f4c3e3825",
        "d94b474119ad0a9d21f3290bfbcc84b4afaeff0d88b2f6f04cced3e949212d9d",
    ),
    "fluent-emoji-flat": _package(
        "fluent-emoji-flat",
        "1.2.6",
        1_172_438,
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "f5f4cf457c0db2ad5a2e42e033e02e0c87d10e43d0164cfffb3bb84914970a63",
        "7f084c5a95807edb4702a7c9f6f18e74d59026d1c34ceb8cae85df0b9a9f0a10",
        "9cd2f13e7039b1d1eeeef92af63b07701ba1b242aadc3c0957eae9c98dca7771",
    ),
    "fxemoji": _package(
        "fxemoji",
        "1.2.2",
        1_034_876,
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "d8ef67b94a32d0abcd314d1c35db56178eaa8fa8ad71130e312f3460e307c2bf",
        _NO_CHARS,
        "d01a247f13e54d726c7702c9168a27d788e97feeb2da92ff92731ebd9a58e8d9",
    ),
    "emojione-v1": _package(
        "emojione-v1",
        "1.2.3",
        3_704_153,
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "7209a500c5607daff4969e5d5ae25da710ab1877c29efec6199d3611a8d5c942",
        _NO_CHARS,
        "ac512cb3da4d2e49d6d83ae863fe7af8691aeedcb2566d9f3c6e71f29eda9898",
    ),
    "emojione": _package(
        "emojione",
        "1.2.3",
        687_690,
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "e9a865faed523a7c3535b5319ae533d09fac1a62b4e96920eb178bb60e707e80",
        _NO_CHARS,
        "a5817a33fa92381a7de4406e10bc42afc9cf76366eab7346062dfd0ecc835d84",
    ),
}
"""The package of each style. Its info.json, which names author and licence, is kept beside the drawings."""

STYLES: tuple[str, ...] = tuple(PACKAGES)
"""The seven styles, by the names of their packages."""

_WRITTEN = {
    "fxemoji": """
1F600=grin 1F603=grinwide 1F604=grineyes 1F601=grinwideeyes 1F606=grinsquint 1F605=grinsweat 1F602=grintears
1F642=smallsmile 1F609=winking 1F60A=smileeyes 1F607=halo 1F60D=hearteyes 1F617=kissing 1F61A=kissclosedeyes
1F619=kisseyes 1F61B=smiletongue 1F61C=tongueoutwink 1F61D=tongueoutwink2 1F610=neutral 1F611=expressionless
1F636=nomouth 1F60F=smirk 1F612=unamused 1F60C=relieved 1F614=pensive 1F62A=sleepy 1F634=sleeping 1F637=medicalmask
1F60E=sunglasses 1F615=confused 1F61F=worried 1F641=smallfrown 1F62E=openmouth 1F62F=hushed 1F632=astonished
1F633=flushed 1F626=frownmouth 1F627=anguish 1F628=fearful 1F630=coldsweat 1F625=dissapointedrelief 1F622=crying
1F62D=loudlycrying 1F631=screamfear 1F616=confounded 1F623=perservere 1F61E=disappointed 1F613=sweat 1F629=weary
1F62B=tired 1F624=triumph 1F621=pouting 1F620=angry 1F608=devilhorns 1F4A9=poo 1F47A=japaneseangrymask 1F648=monkeysee
1F649=monkeyhear 1F64A=monkeyspeak 1F498=heartarrow 1F49D=heartribbon 1F495=2hearts 1F49B=heartyellow 1F49A=heartgreen
1F499=- 1F49C=heartpurple 1F4A2=anger 1F4A6=sweatsplash 1F4A8=dash 1F4AD=thoughtbaloon 1F44B=waving
1F590=raisedhandsfingerssplayed 270B=hand 1F596=raisedhandpartfingers 1F44C=aok 1F44A=fistedhand 1F44F=clap
1F64C=high5 1F450=hands 1F64F=pray 1F4AA=flexbicep 1F471=blonde 1F474=gpa 1F475=gma 1F64D=frown 1F64E=pout
1F645=nogesture 1F646=okgesture 1F64B=handup 1F647=bowing 1F46E=cop 1F575=sleuthspy 1F477=construct 1F473=turban
1F472=guapimao 1F470=bride 1F486=headmassage 1F6B6=walking 1F3C3=running 1F46F=bunny-ears 1F3CA=swimming
1F46D=girlgirl 1F46B=girlguy 1F46C=guyguy 1F48F=couplekiss 1F491=couple 1F436=dog 1F415=dogside 1F431=cat
1F408=catside 1F42F=tiger 1F405=tigerside 1F406=leopardside 1F416=pigside 1F43D=pigsnout 1F401=mouseside
1F439=hampster 1F430=bunny 1F407=bunnyside 1F432=dragonhead 1F409=dragonside 1F433=spurtingwhale
1F490=bouquetofflowers 1F332=evergreen 1F342=fallingleaf 1F343=leaffluttering 1F336=chilipepper 1F365=fishcakeswirl
1F30D=europeafricaglobe 1F30E=americasglobe 1F30F=asiaaustraliaglobe 1F310=meridianglobe 1F5FE=silhouetteohjapan
1F3D4=snowmountains 1F5FC=toykotower 1F685=highspeedtrainbulletnose 1F3CE=racecar 23F3=hourglassflowingsand
1F570=manltepiececlock 1F55B=clock12oclock 1F567=clock12thirty 1F550=clock1oclock 1F55C=clock1thirty
1F551=clock2oclock 1F55D=clock2thirty 1F552=clock3oclock 1F55E=clock3thirty 1F553=clock4oclock 1F55F=clock4thirty
1F560=clock5thirty 1F561=clock6thirty 1F556=clock7oclock 1F316=waningbibbousmoon 26C8=stormcloud 1F326=sunraincloud
1F327=raincloud 1F328=snowcloud 26F1=beachumbrella 26A1=bolt 1F30A=wave 1F38A=confetti 1F380=bow 1F381=present
1F3BE=tennisball 1F52B=- 1F3B2=- 1F004=mahjong 1F576=- 1F454=tie 1F45A=womansshirt 1F45B=pinkwallet 1F45D=makeupbag
1F45E=mensshoe 1F45F=mensrunner 1F460=heels 1F461=sandals 1F462=boot 1F48E=gem 1F507=speakercancellation
1F509=speakeronesoundwave 1F50A=speaker3soundwaves 1F515=bellcancellation 1F399=studiomic 1F39B=controlknob
1F3B9=keyboard 1F4F1=cellphone 1F4F2=phonerightarrowleft 1F4DE=telephonereceiver2 2328=wiredkeyboard 1F4BE=floppydisk2
1F4FC=videocasette 1F50D=leftmagnifyingglass 1F50E=rightmagnifyingglass 1F4D4=notebookdecorativecover
1F4D1=bookmarktab 1F4B4=banknoteyen 1F4B5=banknotedollar 1F4B6=banknoteeuro 1F4B7=banknotepound
1F4B9=chartupwardstrendyen 1F4E4=outbox 1F4EB=closedmailboxraised 1F4EA=closedmailboxlowered 1F4EC=openmailboxraised
1F4ED=openmailboxlowered 1F4C8=chartupwardstrend 1F4C9=chartdownwardstrend 1F510=lockandkey 1FA9F=-
1F6B0=potablewatersystem 1F51E=nooneunder18symbol 1F503=clockwisedownupcircledarrows
1F504=anticlockwiseupwardsanddownwardsarrows 1F519=backwithleftwardsarrow 1F51A=endwithleftwardsarrow
1F51B=onarrowleftright 1F51C=soonwithrightarrow 1F51D=topwithupwardsarrow 271D=heavylatincross
1F52F=sixpointedstarwithdot 2650=saggitarius 1F501=clockwiserightwardsleftwardscirclearrows
1F502=clockwiserightwardsleftwardscirclearrowsone 1F53C=uppointingsmallredtrisngle 1F53D=downpointingsmallredtrisngle
1F505=lowbrightness 1F506=highbrightness 2716=heavymultiplicationsymbol 203C=doubleexclaimationmark
2049=exclaimationquestionmark 2753=blackquestionmark 2755=whiteexclaimationmark 2757=heavyexclaimationmarksymbol
2733=eightspokedasterix 1F4A0=diamondshapewithdotinside
""",
    "emojione-v1": "1F52B=- 2328=wired-keyboard 2753=question-mark 2757=exclamation-mark 1FA9F=-",
    "emojione": "1F52B=- 1F997=- 2753=question-mark 2757=exclamation-mark 2763=heavy-heart-exclamation",
}

NAMES: dict[str, dict[str, str]] = {
    style: dict(pair.split("=") for pair in written.split()) for style, written in _WRITTEN.items()
}
"""The drawings whose name is not the emoji's, by the emoji's code points; "-" where the one of that name shows
another thing.

The emoji "pistol" is called a water pistol today, and was drawn as a revolver; "cricket" is an insect or a game.
"""


def plain(hexcode: str) -> str:
    """Code points without the variation selector FE0F, which sets use differently: "2764-FE0F" is "2764"."""
    return "-".join(code for code in hexcode.upper().split("-") if code != "FE0F")


def letters(name: str) -> str:
    """A name's letters and digits alone: sets differ in spaces, hyphens and capitals."""
    return re.sub("[^a-z0-9]", "", name.lower())


@lru_cache(maxsize=len(STYLES))
def _drawings(style: str) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """A set: its JSON, and the names of its drawings by code points, and by the letters of the name."""
    icons = json.loads(read(PACKAGES[style], "icons.json"))
    codes = {plain(code): name for code, name in json.loads(read(PACKAGES[style], "chars.json")).items()}
    named = {letters(name): name for name in [*icons.get("aliases", {}), *icons["icons"]]}
    return icons, codes, named


def drawing(style: str, hexcode: str, names: tuple[str, ...]) -> str | None:
    """The SVG of one emoji in one style, or None where the style has none.

    Args:
        style: one of `STYLES`.
        hexcode: its code points, as "1F468-200D-1F33E".
        names: what it is called, for the sets that have no code points.

    Raises:
        WeightsMissing: the style was not fetched yet; the message says how.
    """
    icons, codes, named = _drawings(style)
    if style in NAMES:
        listed = NAMES[style].get(plain(hexcode))
        found = listed or next((named[letters(name)] for name in names if letters(name) in named), None)
    else:
        found = codes.get(plain(hexcode))
    if found in (None, "-"):
        return None
    flipped = False
    while (alias := icons.get("aliases", {}).get(found)) and found not in icons["icons"]:
        found, flipped = alias["parent"], flipped ^ alias.get("hFlip", False)
    icon = icons["icons"][found]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = f'<g transform="matrix(-1 0 0 1 {width} 0)">{icon["body"]}</g>' if flipped else icon["body"]
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
