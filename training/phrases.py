"""How people ask for the bundled tools: phrasings for training, and others that are only ever tested.

`{p}` is a path (or folder), `{t}` a text, `{to}` a second path. A text in `{t}` may come with or without
quotes unless the phrasing itself says where it ends.
"""

from __future__ import annotations

TRAIN: dict[str, list[str]] = {
    "files.read": [
        "read {p}", "show {p}", "show me {p}", "print {p}", "open {p}", "display {p}", "cat {p}", "view {p}",
        "read the file {p}", "show the file {p}", "show me the file {p}", "open the file {p}", "print the file {p}", "print the contents of {p}", "open {p} and show it", "show me the contents of {p}",
        "what is the text of {p}", "get me the text of the file {p}", "let me look at {p}", "display the file {p}",
        "read {p} to me", "what text is in {p}", "print what {p} says", "open the note {p}", "let me see the file {p}",
        "what does {p} say", "what does the file {p} say", "what is in the file {p}", "what is written in {p}",
        "what is in {p}", "what's in {p}", "tell me what is in {p}", "tell me what {p} says", "read me {p}",
        "read out {p}", "give me the contents of {p}", "show the contents of {p}", "the contents of {p}",
        "what are the contents of {p}", "let me see {p}", "let me read {p}", "I want to see {p}", "I want to read {p}",
        "look into {p}", "have a look at {p}", "display the text in {p}", "show me what {p} says",
        "read the note {p}", "what does my note {p} say", "show me the text of {p}", "get the text from {p}",
        "load {p}", "I would like to read {p}", "show me what is written in {p}", "what did I write in {p}",
    ],
    "files.list": [
        "list {p}", "list the folder {p}", "list the files in {p}", "ls {p}", "show the folder {p}", "dir {p}",
        "show me the folder {p}", "what files are in {p}", "which files are in {p}", "what is in the folder {p}",
        "what is inside {p}", "which files does {p} have", "show the files in {p}", "show me the files in {p}",
        "list everything in {p}", "list all files in {p}", "what's in the folder {p}", "list the contents of {p}",
        "list what is in {p}", "give me a list of the files in {p}", "tell me which files are in {p}",
        "what do I have in {p}", "show me what is in the folder {p}", "show everything in {p}",
        "which files are in the folder {p}", "what does the folder {p} contain", "how many files are in {p}",
        "show me all files in {p}", "list everything in the folder {p}", "show everything in the folder {p}",
        "what files does {p} have", "which files do I have in the folder {p}", "give me all files in {p}", "list my files in {p}",
        "show me what I have in {p}", "tell me the files in {p}", "show a list of the files in the folder {p}",
        "list the directory {p}", "show the directory {p}", "what is in the directory {p}", "open the folder {p}",
        "look into the folder {p}", "are there files in {p}", "tell me what is in the folder {p}",
    ],
    "files.write": [
        "write {t} to {p}", "write {t} into {p}", "save {t} to {p}", "save {t} as {p}", "save {t} in {p}",
        "create {p} with {t}", "create {p} with the text {t}", "create a file {p} that says {t}",
        "create the file {p} with the text {t}", "make {p} say {t}", "put {t} in a new file {p}",
        "write the text {t} to the file {p}", "make a file {p} with {t}", "make a new file {p} that says {t}",
        "create a new file {p} with {t}", "store {t} in {p}", "write a file {p} that says {t}",
        "create a file called {p} with the text {t}", "make a note {p} that says {t}", "set the content of {p} to {t}",
        "replace the content of {p} with {t}", "overwrite {p} with {t}", "write {p} with the text {t}",
        "create a note {p} saying {t}", "I want a file {p} that says {t}", "save the text {t} to the file {p}",
        "save the note {t} as {p}", "store the text {t} as {p}", "write in {p}: {t}", "create {p}: {t}",
        "write the text {t} into {p}", "write {t} to the file {p}", "save {t} into the file {p}", "save the text {t} in {p}",
        "put the text {t} in the new file {p}", "create the new file {p} with {t}", "make a note called {p} that says {t}",
        "make a new note {p} that says {t}", "create a file {p} with {t}", "create a text file {p} that says {t}",
        "save the words {t} as {p}", "store the words {t} in the file {p}", "create the note {p} with the text {t}",
        "write a new file {p} with the text {t}", "put {t} in the new note {p}", "write down {t} in a new file {p}",
    ],
    "files.append": [
        "add {t} to {p}", "append {t} to {p}", "put {t} at the end of {p}", "add the line {t} to {p}",
        "add the line {t} to the file {p}", "in {p} add {t}", "write {t} at the end of {p}", "add {t} to the file {p}",
        "append the line {t} to {p}", "add a line to {p} that says {t}", "add a line {t} to {p}", "also add {t} to {p}",
        "put {t} on my list {p}", "add {t} to my list {p}", "add {t} to the list {p}", "put {t} on the list {p}",
        "append {t} at the end of {p}", "add a new line {t} to {p}", "note {t} in {p}", "add the text {t} to {p}",
        "append to {p}: {t}", "add to {p}: {t}", "add to {p} the line {t}", "at the end of {p} add {t}",
        "write {t} on a new line in {p}", "extend {p} with {t}", "add one more line to {p}: {t}",
        "I want to add {t} to {p}", "put another line in {p}: {t}", "append a line that says {t} to {p}",
        "append the line {t} to the file {p}", "add the words {t} to {p}", "append the words {t} to {p}",
        "put the text {t} at the end of {p}", "write the text {t} at the end of {p}", "add the line {t} at the end of {p}",
        "add a new line to {p}: {t}", "add another line to {p}: {t}", "add a line to the file {p}: {t}",
        "add a line to the file {p} that says {t}", "append a line to {p}: {t}", "append this to {p}: {t}",
        "add this to the end of {p}: {t}", "put {t} at the end of my list {p}", "append {t} to the list {p}",
        "append {t} to the file {p}", "append the line {t} at the end of the file {p}", "add {t} at the end of {p}",
        "write {t} at the end of the file {p}", "put the line {t} on my list {p}", "add the text {t} to the file {p}",
        "add {t} to my notes in {p}", "put a new line {t} in {p}", "put a line in {p}: {t}",
    ],
    "files.search": [
        "search {p} for {t}", "find {t} in {p}", "look for {t} in {p}", "search for {t} in {p}", "where is {t} in {p}",
        "which files in {p} contain {t}", "which files in {p} mention {t}", "does {p} mention {t}", "grep {t} in {p}",
        "search the folder {p} for {t}", "find the text {t} in {p}", "look through {p} for {t}", "find {t} in the folder {p}",
        "search in {p} for {t}", "where does {p} mention {t}", "look in {p} for {t}", "find all lines with {t} in {p}",
        "search all files in {p} for {t}", "find files with {t} in {p}", "which files in {p} have {t}",
        "is {t} somewhere in {p}", "search {p} for the text {t}", "find the word {t} in {p}", "find where {p} says {t}",
        "look for the word {t} in the folder {p}", "show me the lines with {t} in {p}", "does {t} appear in {p}", "search the text {t} in {p}",
        "look for {t} in the files in {p}", "look in the folder {p} for the word {t}", "find lines with {t} in the folder {p}",
        "search the folder {p} for the word {t}", "search my files in {p} for {t}", "find every file in {p} with {t}",
        "which files in the folder {p} mention {t}", "find the text {t} in the folder {p}", "look for the words {t} in {p}",
    ],
    "files.move": [
        "move {p} to {to}", "rename {p} to {to}", "rename {p} as {to}", "move the file {p} to {to}",
        "rename the file {p} to {to}", "change the name of {p} to {to}", "call {p} {to} from now on", "mv {p} {to}",
        "move {p} into {to}", "put the file {p} at {to}", "give {p} the name {to}", "make {p} become {to}",
        "I want to rename {p} to {to}", "I want {p} moved to {to}", "change {p} into {to}", "let {p} be called {to}",
        "move the file {p} into {to}", "move my note {p} to {to}", "rename the note {p} to {to}", "I want to move the file {p} to {to}",
        "change the name of my file {p} to {to}", "give my file {p} the new name {to}", "move {p} over to {to}",
        "move my file {p} to {to}", "rename my note {p} to {to}", "please rename {p} into {to}",
    ],
    "files.delete": [
        "delete {p}", "remove {p}", "remove the file {p}", "delete the file {p}", "get rid of {p}", "erase {p}",
        "throw away {p}", "rm {p}", "I do not need {p} any more", "delete my file {p}", "erase the file {p}",
        "get rid of the file {p}", "delete the note {p}", "remove my note {p}", "throw {p} away", "please delete {p}",
        "I want {p} gone", "I want to delete {p}", "drop the file {p}", "wipe {p}", "delete the empty folder {p}",
        "remove the folder {p}", "make {p} go away", "get rid of my file {p}", "throw away my note {p}",
        "I do not want {p} any more", "remove the note {p}", "I want my file {p} deleted", "erase my note {p}", "I want you to remove {p}", "trash {p}", "clear away {p}",
    ],
    "system.battery": [
        "how is the battery", "battery", "battery level", "how full is the battery", "what is the battery level",
        "how much battery is left", "check the battery", "show the battery", "is the battery charging",
        "how much charge is left", "what is the charge", "battery status", "are we charging", "is the device charging",
        "tell me the battery level", "what does the battery say", "how much power is left", "is the battery low",
        "is the battery full", "how long will the battery last", "do I need to charge the device", "show me the battery level",
        "what percent is the battery at", "give me the battery status", "how many percent battery are left", "charge level",
    ],
    "system.temperature": [
        "how hot is the device", "what is the temperature", "temperature", "is the device hot", "check the temperature",
        "how warm is it", "how warm is the device", "show the temperature", "what is the cpu temperature", "is it too hot",
        "tell me the temperature", "what temperature does the device have", "is the board hot", "how hot is the cpu",
        "how hot is the board", "is the cpu too hot", "give me the temperature", "show me the temperature", "is it hot",
        "how many degrees does the cpu have", "is the device too warm", "how hot are you", "what does the sensor say",
        "temperature of the device", "cpu temperature", "how hot does it get", "does the device run hot",
    ],
    "system.memory": [
        "how much memory is free", "memory", "free memory", "how much memory is left", "show the memory", "check the memory",
        "how much ram is free", "how much ram is left", "is there enough memory", "what is the memory status", "ram",
        "tell me the free memory", "how much memory does the device have", "memory status", "how full is the memory",
        "how much memory is in use", "show me the free memory", "do we have enough ram", "what is the free ram",
        "how much memory is available", "give me the memory status", "is the memory full", "are we out of memory",
        "how much memory do I have", "how many megabytes of ram are free", "show the free ram",
    ],
    "system.disk": [
        "how much disk space is free", "disk", "disk space", "how full is the disk", "how much space is left", "check the disk",
        "is the disk full", "how much storage is free", "how much storage is left", "show the disk space", "free disk space",
        "how much space is on the disk", "is there enough space", "what is the disk status", "how much room is left",
        "how full is the card", "how full is the sd card", "tell me the free space", "how much space do I have",
        "do we have enough disk space", "show me the free space", "how many gigabytes are free", "storage status",
        "how much space is free on the card", "give me the disk status", "is the card full", "free storage",
    ],
    "system.time": [
        "what time is it", "time", "what is the time", "what day is it", "what is the date", "tell me the time", "date",
        "what is the date today", "how late is it", "what date is it", "which day is today", "current time", "current date",
        "tell me the date", "show the time", "show me the date", "do you know what time it is", "what day is today",
        "give me the time", "what is today", "which date is today", "what time is it now", "can you tell me the time", "show me the date and time", "date and time", "the time now", "what's the time", "what's the date",
        "is it late", "can you see the clock", "what does the clock say", "check the clock",
    ],
}  # fmt: skip

HELD_OUT: dict[str, list[str]] = {
    "files.read": [
        "show me the contents of the file {p}", "I would like to see {p}", "open {p} and read it", "get me the text in {p}",
        "what text is in the file {p}", "let me have a look at {p}", "display the contents of {p}", "print what is in {p}",
    ],
    "files.list": [
        "list the contents of the folder {p}", "show me everything in {p}", "what files do I have in {p}",
        "tell me what files are in the folder {p}", "give me the files in {p}", "show me a list of the files in {p}",
    ],
    "files.write": [
        "create a file {p} with the text {t}", "write {t} into the file {p}", "save the text {t} as {p}",
        "make a new file called {p} that says {t}", "put the text {t} in a new file {p}", "create a new note {p} that says {t}",
    ],
    "files.append": [
        "append the text {t} to {p}", "add the text {t} at the end of {p}", "put {t} at the end of the file {p}",
        "add another line to {p} that says {t}", "append {t} to my list {p}", "add a new line to the file {p}: {t}",
    ],
    "files.search": [
        "search the files in {p} for {t}", "look for the text {t} in {p}", "find the word {t} in the folder {p}",
        "which files in the folder {p} contain {t}", "find all files with {t} in {p}", "search {p} for the word {t}",
    ],
    "files.move": [
        "move the note {p} to {to}", "change the name of the file {p} to {to}", "rename my file {p} to {to}",
        "I want to move {p} to {to}", "give the file {p} the name {to}",
    ],
    "files.delete": [
        "remove my file {p}", "I want the file {p} gone", "get rid of the note {p}", "throw away the file {p}",
        "I do not need the file {p} any more", "please erase {p}",
    ],
    "system.battery": [
        "tell me how full the battery is", "how much battery do we have left", "show me the battery status",
        "what is the charge of the battery", "is the battery of the device full", "check the battery level",
    ],
    "system.temperature": [
        "tell me how hot the device is", "what is the temperature of the cpu", "check how hot the board is",
        "is the cpu hot", "show me how warm the device is", "what temperature does the cpu have",
    ],
    "system.memory": [
        "tell me how much memory is free", "how much free memory do we have", "show me the memory status",
        "is there enough ram left", "how much of the memory is in use", "check how much ram is free",
    ],
    "system.disk": [
        "tell me how much disk space is left", "how much free space is on the disk", "show me the disk status",
        "is there enough room on the disk", "check how full the disk is", "how much storage do we have left",
    ],
    "system.time": [
        "tell me what time it is", "what is the time now", "can you tell me the date", "show me the current time",
        "which date is it today", "what is the current date",
    ],
}  # fmt: skip

NO_TOOL = [
    "send {w} a message", "call {w}", "play {w} {w}", "turn on the {w} light", "order {w}", "translate {w} to french",
    "what is {n} times {n}", "who is {w} {w}", "turn off the {w}", "send an email to {w}", "book a table for {n}",
    "tell me a joke", "sing a song", "set an alarm for {n}", "remind me of {w} at {n}", "what is the weather",
    "what is the weather in {w}", "will it rain in {w}", "how is the weather", "weather", "what is the weather like", "is the weather good",
    "what will the weather be tomorrow", "tell me the weather", "tell me who {w} is", "tell me a story about {w}",
    "send a mail to {w}", "write a letter to {w}", "play the {w} song", "what is {n} minus {n}", "how much is {n} times {n}",
    "buy me some {w}", "turn the {w} light off", "order some {w} for {n}", "translate the word {w}", "weather in {w}", "buy {n} {w}", "play some music", "take a picture",
    "who won the game", "what is {n} plus {n}", "add {n} and {n}", "open the door", "start the car", "close the {w} window",
    "how far is it to {w}", "write a poem about {w}", "what does {w} mean", "call my {w}", "show me a video of {w}",
]  # fmt: skip
NO_TOOL_HELD_OUT = [
    "send a message to {w}", "play the song {w}", "turn off the {w} light", "what is the weather today",
    "translate {w} {w} to french", "buy some {w}", "what is {n} times {n} plus {n}", "tell me about {w}",
]  # fmt: skip

CHAT = {
    "hello": "Hello! What should I do?", "hi": "Hello! What should I do?", "hey": "Hello! What should I do?",
    "good morning": "Hello! What should I do?", "hello there": "Hello! What should I do?",
    "thanks": "You are welcome.", "thank you": "You are welcome.", "thanks a lot": "You are welcome.",
    "great": "You are welcome.", "good job": "You are welcome.", "perfect": "You are welcome.",
    "who are you": "I am agentd's pocket model. I only know the bundled tools.",
    "what are you": "I am agentd's pocket model. I only know the bundled tools.",
    "what can you do": "I can read, write, list, search, move and delete files and check this device.",
    "help": "I can read, write, list, search, move and delete files and check this device.",
    "what tools do you have": "I can read, write, list, search, move and delete files and check this device.",
    "bye": "Goodbye.", "goodbye": "Goodbye.", "see you": "Goodbye.",
}  # fmt: skip

BEFORE = ["", "", "", "", "please ", "can you ", "could you ", "hey, ", "now ", "ok, ", "then ", "I need you to ", "would you "]
AFTER = ["", "", "", "", "", " please", " for me", " now", " again", ", please", ", thanks"]
