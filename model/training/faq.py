"""
The demo model's answers about using this service. Every answer must stay true.
"""

from model.training.canned import canned

FAQ = (
    canned(
        """
        NEED a [GPU/graphics card/fast computer/big machine/CUDA card/NVIDIA card]? | [Is/Would] a
        [GPU/graphics card] [be/] [needed/required/necessary/used]? | No GPU? | [Does it/Do you/Can
        it/Will it] [run/work] [on a CPU/without a GPU/on a laptop/on an old PC]? | [What/Which]
        hardware [do I need/is needed/is required/do you run on]? | Do you run on a GPU?
        """,
        "No GPU is needed: it runs on a CPU.",
    ),
    canned(
        """
        [Which/What] port [do you use/does it listen on/is it/does edge use/is used/do I connect
        to]? | [What is/What's/Tell me/Say] the [default/HTTP/server/edge/] port? | What port? | On
        [which/what] port [does edge listen/does it run/are you/do I find you/is the service]? |
        Where does it listen? | [Which/What] [address/URL] [do I open/are you at/does it have/is
        it]? | Where [do I find/is] the [web page/website/chat page/web interface/browser page]? |
        Is there a [web page/web interface/user interface/GUI]? | Can I chat in [the/a/my] browser?
        | Is there a [browser/web] chat?
        """,
        "Edge listens on port 8002: open http://localhost:8002 in a browser.",
    ),
    canned(
        """
        HOW-TO [use/load/add/run/plug in/install/serve] [my own/my/another/a different/my
        fine-tuned/a new] [model/GGUF/GGUF file/LLM]? | HOW-TO [change/replace/swap/switch/exchange]
        the [model/GGUF]? | [Where/In which folder] do I [put/place/drop/copy/save] my
        [model/GGUF/own model/model file]? | Where does [my/the] [GGUF/model/model file] go? | Which
        folder is for [models/my model]? | Can I [use/run/load/have] [my own/another/a different/a
        better/a bigger] model? | I [have/made/trained/fine-tuned] [a model/my own model/a GGUF].
        [Where does it go/What now]?
        """,
        "Put your .gguf file into `model/` or set MODEL_PATH, then restart.",
    ),
    canned(
        """
        WHAT-IS MODEL_PATH? | What does MODEL_PATH do? | HOW-TO [set/change] the model path? | What
        is MODEL_PATH for? | What if [there are/I have/I put in] [several/two/many/more] models? |
        Can I [have/put] [several/two/many/multiple] [models/GGUF files] [in model/there/]? | HOW-TO
        [choose/pick/select] [one of several models/between two models/a model file]? |
        [Two/Several] [models/files/GGUFs] in the folder, [which one is taken/what happens]?
        """,
        "MODEL_PATH names the GGUF file to load; with several in `model/` it must be set.",
    ),
    canned(
        """
        NEED a [chat template/prompt template]? | WHAT-IS [a/the] chat template?
        | [Which/What] [template/prompt format/chat format] [is used/do you use/must my model have]?
        | Where does the [chat/prompt/] template come from? | Must [my/the] model have a template?
        """,
        "The chat template comes from the GGUF file: every chat model's GGUF has one.",
    ),
    canned(
        """
        HOW-TO [use/load/add/serve/run] [a/my/an/] [LoRA/adapter/LoRA adapter/QLoRA]? | [Can I
        use/Do you support/Are there/Does it support] [LoRA/adapters/LoRA adapters/a LoRA]? | Where
        do [adapters/LoRA adapters/LoRAs/my adapters] go? | WHAT-IS [an adapter/a LoRA/LoRA]? |
        HOW-TO [choose/pick/select] an adapter? | And LoRA? | I have [a LoRA/an adapter]. What now?
        """,
        "LoRA adapters go into `model/adapters/`; a request chooses one by its model name.",
    ),
    canned(
        """
        HOW-TO [clear/reset/delete/erase/empty] the
        [history/conversation/context/session/memory/chat]? | [Clear/Reset/Delete/Erase]
        [the/my/our] [history/conversation/session/context/memory]. | Clear history. | [Can
        you/Please/Now/] forget [everything/what I said/all/all I said/me]. | HOW-TO [make you
        forget/start over/begin anew/start afresh/reset you/wipe your memory]? | Forget [it/that/all
        that]. | [Reset/Wipe] [yourself/your memory/everything]. | How do I clear my session? | What
        does [clear-history/POST clear-history] do? | What is /clear-history? | Can you forget?
        """,
        "POST /clear-history forgets the context of a session.",
    ),
    canned(
        """
        HOW-TO [send a message/chat over HTTP/call the API/use the API/talk to you over HTTP/ask by
        HTTP]? | What does POST /chat do? | What is /chat? | What does /chat do? | Is there [an
        API/a REST API]? | [Which/What] [endpoint/route/URL/path] [is for chat/do I call/is for
        chatting/do I post to]? | What is the chat endpoint? | Do you stream? | How are answers
        streamed? | Can I use curl? | HOW-TO [get a stream/stream an answer/use curl/send a prompt]?
        | Do you support streaming?
        """,
        "POST /chat with a prompt streams the tokens of the answer by SSE.",
    ),
    canned(
        """
        [Is there/Do you have/Do you support/Does it have] [an/the] OpenAI[-compatible/ compatible/]
        [API/endpoint/interface]? | Can I use [the OpenAI SDK/an OpenAI client/OpenAI's library]? |
        Are you [OpenAI compatible/compatible with OpenAI]? | HOW-TO use the OpenAI
        [API/SDK/client]? | [What is/What about] /v1/chat/completions? | Does it work with OpenAI
        clients?
        """,
        "POST /v1/chat/completions is compatible with OpenAI's API.",
    ),
    canned(
        """
        HOW-TO [see/list/read/get/fetch/show] [past/old/all/the last/previous] [messages/chats]? |
        What does GET /messages do? | What does /messages do? | What is /messages? | Where are past
        messages? | HOW-TO [read the history/list old conversations/see what was said]? | Can I see
        old messages?
        """,
        "GET /messages lists the past messages.",
    ),
    canned(
        """
        HOW-TO [check/see/get/ask for] [the status/its status/the state of the service]? | What does
        GET /status [do/show]? | What is /status? | What does /status show? | Is the
        [model/database] [loaded/connected]? | HOW-TO [see if the model is loaded/know that it
        works/check that it runs/monitor it]? | Are you [online/healthy]? | [How do I know/How can I
        see/How can I tell] [it is/it's/that it is] [healthy/up /working/alive/running/fine]? | Is
        there a health check? | Is [everything/all/the service]
        [okay/running/working/up/online/fine]?
        """,
        "GET /status shows whether the model is loaded and the database is connected.",
    ),
    canned(
        """
        HOW-TO [cancel/stop/interrupt/abort/end] [an answer/a request/a running
        answer/generating/you]? | Can I [cancel/stop/interrupt] [an answer/a request/you/the
        generation]? | Can you be stopped?
        """,
        "DELETE /chat/{request_id} stops an answer, and so does closing the connection.",
    ),
    canned(
        """
        NEED [MongoDB/Mongo/a database/a DB/any database]? | Is [MongoDB/Mongo/a database] [required
        /needed/optional/necessary/mandatory]? | Does it [run/work] without [MongoDB/Mongo/a
        database]? | Can I [use it/run it/start it] without [MongoDB/Mongo/a database]? | What if
        Mongo is down?
        """,
        "No, MongoDB is optional: it stores an archive, and everything works without it.",
    ),
    canned(
        """
        HOW-TO [set up/connect/configure/use/add] [MongoDB/Mongo/the database/a database]? | WHAT-IS
        MONGODB_URI? | HOW-TO set the database? | Which setting is for [MongoDB/the database]?
        """,
        "Set MONGODB_URI to the address of your MongoDB; the database is called finetuneLLM.",
    ),
    canned(
        """
        HOW-TO [start/run/launch/install/set up/boot/deploy/try] [it/FineTuneLLM/this/the
        service/you /the services/everything]? | What does just up do? | [How do I/How can I/I want
        to] [get started /begin/start]? | [What/Which] command [starts/runs/launches]
        [it/everything/all of this]? | What do I type to start it? | HOW-TO install it? | HOW-TO
        [get it running/get this up/make it run/bring it up] [locally/here/on my computer/]?
        """,
        "`pip install rust-just && just up` runs everything on one machine.",
    ),
    canned(
        """
        HOW-TO [stop/shut down/quit/end/terminate/exit] [it/FineTuneLLM/the service/the
        server/everything]? | How does it stop? | [Which/What] key [stops/ends] it? | How is it
        [stopped/shut down]?
        """,
        "Ctrl-C ends it; answers that have begun are finished.",
    ),
    canned(
        """
        What [do I need/is needed/is required/must I have/should I install] [to run it/to start
        /first/before/to install it/]? | [What/Which] [are the requirements/software do I need]?
        | [Which/What] [Python/version of Python/Python version] [do I need/is needed/is required]?
        | NEED [Python/a compiler/a C compiler]? | WHAT-IS the requirements? | Any prerequisites?
        """,
        "You need Linux or macOS, Python 3.11 or newer and a C/C++ compiler.",
    ),
    canned(
        """
        Does it [run/work] on [Windows/Linux/macOS/a Mac/Ubuntu/Debian/a Raspberry Pi/Windows 11]? |
        [Which/What] [operating systems/systems/platforms/OS] [are supported/does it run on/can I
        use]? | [Can I/Will it/Would it/Does this] [run/work/be used/install] on
        [Windows/Linux/macOS/a Mac/Ubuntu/my Mac /my MacBook/my laptop/a server/my phone/a tablet/a
        PC/Android/an iPad/Fedora]? | Windows? | [Is there/Do you have] a Windows version? | Is
        [Windows/Linux/macOS] supported? | And a Mac?
        """,
        "It runs on Linux and macOS, and elsewhere in Docker.",
    ),
    canned(
        """
        How long does [the first start/starting/the installation/the setup/compiling/installing]
        take? | How [long/much time] does it take to [start/install/compile/build/begin/get ready]?
        | Why [does it take/is it taking] so long? | Why is the first start [so slow/slow]? | Is it
        slow? | Is the first [run/start/time] slow?
        """,
        "The first start compiles llama.cpp: 4 to 10 minutes on two cores.",
    ),
    canned(
        """
        HOW-TO [run/start] the [tests/test suite]? | HOW-TO test [it/FineTuneLLM/the
        code/everything]? | What does just test do? | How are the tests run? | Where are the tests?
        | Are there tests?
        """,
        "`just test` runs the tests.",
    ),
    canned(
        """
        HOW-TO [chat/talk] [to you/with you/] [in the terminal/from the command line/in the shell]?
        | What does just chat do? | Can I [chat/talk] in [the/a/my] [terminal/console/shell]?
        | Is there a [terminal chat/command line client/CLI/console client]? | NEED a browser?
        """,
        "`just chat` chats in the terminal.",
    ),
    canned(
        """
        HOW-TO train [this model/the demo model/you/you again/this demo]? | What does just
        train-demo do? | HOW-TO retrain you? | Can I [train/retrain/teach] you [again/]? | Can you
        be [trained/retrained]?
        """,
        "`just train-demo` trains this demo model.",
    ),
    canned(
        """
        HOW-TO [configure/set up/adjust/customise] [it/FineTuneLLM/the service]? | What is .env
        [for/]? | Where [are/do I find/do I put] the [settings/options/configuration]? | Where is
        the config? | HOW-TO [change/set/edit] [a setting/the settings/an option/the configuration]?
        | How is it configured? | Is there a [config/configuration/settings] file?
        """,
        "Settings are environment variables, or lines of a .env file.",
    ),
    canned(
        """
        HOW-TO [scale/scale up] [it/inference/the service/FineTuneLLM]? | [Can it/Does it/How does
        it] scale? | HOW-TO [run/add/start/have] [more/several/three/many/two] [workers/inference
        workers/models]? | Can I [run/have/start/add] [several/more/many/two/five]
        [workers/inference services]? | Can [more/several/many] [machines/workers] [work together/be
        used/share the work]? | [What if/What happens when] [many users come/it gets slow/there is
        too much load]?
        """,
        "`docker compose up -d --scale inference=3` runs three inference workers.",
    ),
    canned(
        """
        [Can I use/Do you support/Is there/HOW-TO use/What about] Docker? | And Docker? | Docker? |
        HOW-TO [run/start/deploy] it [with/in] Docker? | Does it run in [Docker/a
        container/containers]? | Is there a [Docker setup/docker compose file/container/Docker
        image]? | HOW-TO start it with docker compose?
        """,
        "`docker compose up -d` starts NATS, MongoDB and the three services.",
    ),
    canned(
        """
        [Is it/Is this/Is FineTuneLLM] [free/open source]? | What does it cost? | What is the
        license? | Do I have to pay? | How much is it? | [Where is/Where do I find] the
        [documentation/manual/docs]? | [Is there/Do you have] [documentation/a manual/more
        information]? | Where can I read more? | What should I read [first/next]? | Where is the
        [README/source code]?
        """,
        "That stands in the README and in the folder `docs/` of the project.",
    ),
)
