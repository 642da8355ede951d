"""The words that `make_requests.py` builds requests from: for training and held-out rows apart, nothing in both.

TEMPLATES[intent] is (training phrasings, held-out phrasings); `{slot}` stands for a value of POOLS[slot], which is
(training values, held-out values). CATEGORIES are the few fixed values that a device knows, the same in both.
"""

from __future__ import annotations


def words(text: str) -> list[str]:
    """The values in `text`, separated by semicolons."""
    return text.split(";")


UNITS = [("miles", "kilometers"), ("pounds", "kilograms"), ("inches", "centimeters"), ("cups", "liters"), ("feet", "meters")]

CATEGORIES: dict[str, list[str]] = {
    "list": ["shopping", "packing", "wish", "to-do"],
    "day": ["today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "room": ["kitchen", "bedroom", "hall", "office", "garage", "bathroom", "attic"],
    "state": ["on", "off"],
    "by": ["car", "bus", "bike", "train"],
}

POOLS: dict[str, tuple[list[str], list[str]]] = {
    "duration": (
        [f"{n} minutes" for n in (2, 4, 5, 8, 10, 12, 15, 20, 22, 25, 30, 35, 45, 50)]
        + [f"{n} seconds" for n in (10, 15, 20, 40, 45, 90)]
        + [f"{n} hours" for n in (2, 4, 6, 9)],
        [f"{n} minutes" for n in (3, 6, 7, 9, 14, 18, 24, 40)] + ["30 seconds", "50 seconds", "3 hours", "5 hours"],
    ),
    "time": (
        [f"{h} {half}" for h in (1, 3, 4, 6, 8, 9, 11) for half in ("am", "pm")]
        + [
            f"{h}:{m} {half}"
            for h, m, half in zip((5, 6, 7, 8, 9, 10, 12, 2), (15, 30, 45, 20, 40, 10, 50, 35), ("am", "pm") * 4, strict=True)
        ]
        + ["noon"],
        ["2 pm", "5 am", "7 am", "7 pm", "10 am", "10 pm", "5:45 pm", "6:20 am", "8:05 pm", "11:30 am", "midnight"],
    ),
    "item": (
        words(
            "milk;brown rice;sunscreen;a phone charger;tomatoes;paper towels;olive oil;socks;dog food;oat cookies;batteries;"
            "green tea;a toothbrush;blue paint;birthday candles;potatoes;a rain jacket;dish soap;black beans;red onions;"
            "wool gloves;printer ink;orange juice;garlic;hiking boots;a tent;yogurt;light bulbs;almonds;shampoo"
        ),
        words(
            "eggs;cat litter;a swimsuit;coffee filters;spinach;goat cheese;a flashlight;honey;running shoes;lemons;"
            "white vinegar;a travel pillow;frozen peas;hand cream;maple syrup"
        ),
    ),
    "person": (
        words(
            "Anna;Marcus;Grandma;Priya;Tom;Elena;Mr. Novak;Jamal;Sofia;Uncle Ben;Kenji;Laura;Omar;Dana;Felix;Ingrid;Mei;"
            "Dr. Patel;Rosa;Victor;my boss;Hannah;Diego;Nadia;Oliver"
        ),
        words("Lucas;Fatima;Aunt May;Bjorn;Chloe;Mrs. Klein;Ravi;Gloria;Stefan;my sister;Yuki;Peter"),
    ),
    "text": (
        words(
            "I am running late;dinner is ready;the meeting is moved;happy birthday;call me back;I found your keys;"
            "we won the game;the train is delayed;see you at the gate;thanks for the ride;the package is here;"
            "good luck today;I will bring dessert;the door is open;please feed the fish;I missed the bus;"
            "lunch was great;the rent is paid;bring your laptop;we are outside;the baby is asleep;I need ten more minutes"
        ),
        words(
            "I am on my way;the car is fixed;do not wait for me;class is canceled;I left the tickets;"
            "congratulations on the job;"
            "the soup is too salty;my flight landed;turn down the music;we need more chairs;the plumber is coming;"
            "save me a seat"
        ),
    ),
    "place": (
        words(
            "Luigi's;the Blue Door;Sakura House;Casa Verde;the Old Mill;Bombay Garden;Chez Marie;Harbor Grill;Taco Loco;"
            "the Copper Pot;Golden Wok;Little Athens;the Green Olive;River Cafe;Smokey Joe's;Pho Saigon;Nonna's Table;"
            "the Brass Lantern;Fox and Hound;Maple Diner"
        ),
        words(
            "Tony's;the Red Barn;Lotus Kitchen;El Camino;the Silver Spoon;Marrakesh;Ocean Shack;Bistro Nine;"
            "Dragon Palace;the Corner Bakery"
        ),
    ),
    "people": (words("2;3;4;5;6;8;10;12;14"), words("7;9;11;13;16")),
    "artist": (
        words(
            "Miles Davis;Adele;the Beatles;Nina Simone;Daft Punk;Shakira;Bob Dylan;Queen;Rihanna;Johnny Cash;Coldplay;Bach;"
            "Fela Kuti;Radiohead;Aretha Franklin;ABBA;Drake;Norah Jones;Metallica;Chopin;the Supremes;Stevie Wonder"
        ),
        words(
            "David Bowie;Beyonce;Mozart;the Rolling Stones;Ella Fitzgerald;Pink Floyd;Prince;Kendrick Lamar;Joni Mitchell;"
            "Vivaldi;Blondie"
        ),
    ),
    "genre": (
        words("jazz;rock;opera;country;hip hop;folk;techno;soul;reggae;piano;disco;metal;swing;punk"),
        words("blues;salsa;classical;funk;gospel;ambient;indie"),
    ),
    "task": (
        words(
            "water the plants;call the dentist;take my pills;pay the rent;walk the dog;book a flight;wash the car;"
            "send the invoice;buy a gift;clean the oven;charge the camera;sign the form;feed the cat;check the mail;"
            "renew my passport;back up my laptop;return the books;change the filter;order more ink;thank the neighbors;"
            "cancel the trial;lock the shed"
        ),
        words(
            "mow the lawn;call the bank;stretch my legs;pick up the cake;fix the sink;vote;turn off the grill;"
            "iron my shirt;defrost the chicken;update the budget;visit the doctor;empty the bins"
        ),
    ),
    "city": (
        words(
            "Paris;Denver;Tokyo;Cairo;Oslo;Lima;Chicago;Madrid;Seoul;Boston;Nairobi;Dublin;Vienna;Phoenix;Toronto;Athens;"
            "Mumbai;Prague;Seattle;Havana;Warsaw;New Orleans;Cape Town;Salt Lake City;Helsinki;Bangkok"
        ),
        words("Berlin;Miami;Sydney;Rome;Austin;Hong Kong;Lisbon;Portland;Istanbul;Santa Fe;Montreal;Geneva;Kyoto"),
    ),
    "degrees": (words("17;18;20;21;23;60;62;65;67;68;71;72;75"), words("16;19;22;24;64;66;69;70;73")),
    "goal": (
        words(
            "the airport;Central Station;the nearest pharmacy;City Hall;the zoo;Oak Street;the stadium;Pier 4;the museum;"
            "work;the public library;Market Square;the post office;Hill Road;the hospital;the botanical garden;"
            "the closest bank;Lincoln Park;the opera house;Elm Avenue"
        ),
        words(
            "the beach;the train depot;King Street;the nearest gas station;the aquarium;school;Union Square;the city pool;"
            "the farmers market;Lake Drive;the courthouse"
        ),
    ),
    "amount": (words("2;4;5;8;10;12;15;20;30;45;50;60;80;100;250"), words("7;9;16;19;25;40;70;90;120;300")),
}

TEMPLATES: dict[str, tuple[list[str], list[str]]] = {
    "timer": (
        [
            "set a timer for {duration}",
            "start a timer, {duration}",
            "timer, {duration}",
            "count down {duration}",
            "give me a timer of {duration}",
            "can you time {duration} for me",
            "please run a timer for {duration}",
            "put {duration} on the timer",
            "I need a timer for {duration}",
            "set the countdown to {duration}",
        ],
        [
            "make a timer for {duration}",
            "begin a timer of {duration}",
            "could you set {duration} on the timer",
            "new timer: {duration}",
        ],
    ),
    "alarm": (
        [
            "wake me up at {time}",
            "set an alarm for {time} {day}",
            "set an alarm for {time}",
            "alarm at {time} on {day}",
            "I have to get up at {time} {day}",
            "please wake me at {time} on {day}",
            "get me out of bed at {time}",
            "put an alarm on {day} at {time}",
            "ring the alarm at {time}",
            "I want an alarm {day} at {time}",
        ],
        [
            "wake me {day} at {time}",
            "create an alarm for {time}",
            "make the alarm go off at {time} {day}",
            "I need to be up at {time}",
        ],
    ),
    "add": (
        [
            "add {item} to my {list} list",
            "put {item} on the {list} list",
            "{item} goes on my {list} list",
            "write {item} on my {list} list",
            "I need {item} on the {list} list",
            "please add {item} to the {list} list",
            "my {list} list should have {item}",
            "can you put {item} on my {list} list",
            "{list} list: add {item}",
            "remember {item} for the {list} list",
        ],
        [
            "include {item} in my {list} list",
            "on the {list} list, write {item}",
            "could you add {item} to my {list} list",
            "stick {item} on my {list} list",
        ],
    ),
    "message": (
        [
            "tell {person} {text}",
            "text {person}: {text}",
            "send {person} a message saying {text}",
            "write to {person} that {text}",
            "let {person} know that {text}",
            "message {person} and say {text}",
            "please tell {person} that {text}",
            "send a text to {person}: {text}",
            "can you text {person} that {text}",
            "drop {person} a line saying {text}",
        ],
        [
            "inform {person} that {text}",
            "send word to {person}: {text}",
            "could you message {person} that {text}",
            "shoot {person} a text saying {text}",
        ],
    ),
    "book": (
        [
            "book a table for {people} at {place} at {time}",
            "reserve {place} for {people} people at {time}",
            "get us a table at {place}, {people} people, {time}",
            "I want to eat at {place} at {time} with {people} people",
            "table for {people} at {place}",
            "make a reservation at {place} for {people}",
            "please book {place} at {time} for {people}",
            "can you reserve a table for {people} at {place}",
            "dinner at {place} for {people} at {time}",
            "we are {people} and want a table at {place} at {time}",
        ],
        [
            "find us a table at {place} for {people} at {time}",
            "could you book {place} for {people} people",
            "reserve a table at {place} at {time} for {people}",
            "lunch for {people} at {place} at {time}",
        ],
    ),
    "play": (
        [
            "play {artist}",
            "play some {genre}",
            "I want to hear {artist}",
            "put on {artist}",
            "put on some {genre} music",
            "let us listen to {genre}",
            "start a song by {artist}",
            "can you play {genre} music",
            "please play something by {artist}",
            "I am in the mood for {genre}",
            "shuffle songs by {artist}",
            "some {genre}, please",
        ],
        [
            "let me hear a track by {artist}",
            "could you put on {genre}",
            "I would like to listen to {artist}",
            "start playing {genre} music",
            "give me some {artist}",
        ],
    ),
    "remind": (
        [
            "remind me to {task}",
            "remind me to {task} at {time}",
            "remind me {day} to {task}",
            "don't let me forget to {task}",
            "I have to {task} at {time}, remind me",
            "set a reminder to {task} on {day}",
            "please remind me to {task} {day} at {time}",
            "at {time} remind me to {task}",
            "make sure I {task} {day}",
            "reminder: {task} at {time}",
        ],
        [
            "give me a reminder to {task} at {time}",
            "could you remind me to {task} on {day}",
            "help me remember to {task}",
            "on {day} remind me to {task}",
        ],
    ),
    "weather": (
        [
            "what is the weather in {city}",
            "how is the weather in {city} {day}",
            "will it rain in {city} on {day}",
            "weather for {city} {day}",
            "do I need an umbrella in {city} {day}",
            "is it cold in {city}",
            "tell me the forecast for {city}",
            "forecast for {city} on {day}",
            "is it sunny in {city} {day}",
            "how hot will it get in {city} on {day}",
        ],
        [
            "what will the weather be in {city} on {day}",
            "give me the {city} forecast",
            "is it going to snow in {city} {day}",
            "how warm is it in {city}",
        ],
    ),
    "light": (
        [
            "turn {state} the lights in the {room}",
            "turn the {room} light {state}",
            "switch {state} the {room} lights",
            "{room}: lights {state}",
            "please turn {state} the {room} light",
            "lights {state} in the {room}",
            "can you switch the {room} light {state}",
            "I want the {room} lights {state}",
        ],
        [
            "switch the lights {state} in the {room}",
            "could you turn {state} the lamp in the {room}",
            "get the {room} lights {state}",
        ],
    ),
    "heat": (
        [
            "set the {room} to {degrees} degrees",
            "heat the {room} to {degrees}",
            "make it {degrees} degrees in the {room}",
            "set the thermostat to {degrees}",
            "I want {degrees} degrees in the {room}",
            "thermostat to {degrees} degrees",
            "please warm the {room} to {degrees} degrees",
            "turn the heating to {degrees}",
            "{room} at {degrees} degrees",
            "can you set the {room} temperature to {degrees}",
        ],
        [
            "bring the {room} to {degrees} degrees",
            "could you put the thermostat at {degrees}",
            "the {room} should be {degrees} degrees",
            "change the heating to {degrees} degrees",
        ],
    ),
    "go": (
        [
            "take me to {goal}",
            "how do I get to {goal} by {by}",
            "directions to {goal}",
            "navigate to {goal} by {by}",
            "I want to go to {goal}",
            "find a way to {goal} by {by}",
            "show me the route to {goal}",
            "please guide me to {goal} by {by}",
            "which way is {goal}",
            "get me to {goal} by {by}",
        ],
        [
            "what is the best route to {goal} by {by}",
            "lead me to {goal}",
            "could you give me directions to {goal} by {by}",
            "I need to get to {goal}",
        ],
    ),
    "convert": (
        [
            "convert {amount} {unit} to {unit2}",
            "how many {unit2} are {amount} {unit}",
            "{amount} {unit} is how many {unit2}",
            "what is {amount} {unit} in {unit2}",
            "change {amount} {unit} into {unit2}",
            "please convert {amount} {unit} into {unit2}",
            "I have {amount} {unit}, how many {unit2} is that",
            "turn {amount} {unit} into {unit2}",
        ],
        [
            "express {amount} {unit} in {unit2}",
            "could you convert {amount} {unit} to {unit2}",
            "how much is {amount} {unit} in {unit2}",
        ],
    ),
}

# In an answer, a value stands under this key; a slot not listed stands under its own name.
KEYS: dict[str, str] = {"person": "to", "place": "at", "goal": "to", "unit": "from", "unit2": "to", "city": "city"}
ORDER: dict[str, list[str]] = {
    "timer": ["duration"], "alarm": ["time", "day"], "add": ["item", "list"], "message": ["person", "text"],
    "book": ["place", "people", "time"], "play": ["artist", "genre"], "remind": ["task", "time", "day"],
    "weather": ["city", "day"], "light": ["room", "state"], "heat": ["room", "degrees"], "go": ["goal", "by"],
    "convert": ["amount", "unit", "unit2"],
}  # fmt: skip

CAPITALS: dict[str, str] = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Egypt": "Cairo",
    "Canada": "Ottawa", "Peru": "Lima", "Norway": "Oslo", "Kenya": "Nairobi", "Greece": "Athens", "Cuba": "Havana",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Ireland": "Dublin", "Finland": "Helsinki",
    "Thailand": "Bangkok", "Hungary": "Budapest", "Sweden": "Stockholm",
}  # fmt: skip

OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "early": "late", "open": "closed", "hard": "soft", "happy": "sad", "fast": "slow",
    "dark": "light", "full": "empty", "high": "low", "old": "new", "wet": "dry", "loud": "quiet", "strong": "weak",
    "heavy": "light", "near": "far", "rich": "poor", "thick": "thin", "clean": "dirty", "true": "false",
}  # fmt: skip
