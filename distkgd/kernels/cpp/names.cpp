// Triples as text turned into numbers in one pass: each line is checked, each name looked up in a growing hash table.
//
// Whatever is not as it should be ends the pass with -1, and its names are forgotten; what is wrong, and where, is for
// the caller to say.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace {

template <class T> T load(const char* p) {
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

uint64_t mix(uint64_t a, uint64_t b) {
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

// Of n > 0 bytes. What names are numbered by does not depend on it: only the speed does.
uint64_t hash_of(const char* p, uint64_t n) {
    uint64_t h = n * 0x9e3779b97f4a7c15u;
    for (; n > 8; p += 8, n -= 8) h = mix(h ^ load<uint64_t>(p), 0xd6e8feb86659fd93u);
    const uint64_t last = n >= 4 ? (uint64_t)load<uint32_t>(p) << 32 | load<uint32_t>(p + n - 4)
                                 : (uint64_t)(uint8_t)p[0] << 16 | (uint8_t)p[n / 2] << 8 | (uint8_t)p[n - 1];
    return mix(h ^ last, 0xa0761d6478bd642fu);
}

// As strict as Python's decoder: no overlong forms, no surrogates, nothing above U+10FFFF.
bool is_utf8(const char* text, uint64_t n) {
    const uint8_t *p = (const uint8_t*)text, *end = p + n;
    while (p < end) {
        const uint8_t lead = *p++;
        if (lead < 0x80) continue;
        if (lead < 0xc2 || lead > 0xf4) return false;
        const int more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        if (end - p < more) return false;
        const uint8_t least = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
        const uint8_t most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
        if (p[0] < least || p[0] > most) return false;
        for (int i = 1; i < more; ++i)
            if ((p[i] & 0xc0) != 0x80) return false;
        p += more;
    }
    return true;
}

// Names by number, in order of appearance.
struct Table {
    struct Slot {
        uint64_t hash, at;  // at: of the name in `names`; 0: free
    };
    static constexpr uint64_t head = 8;  // bytes before each name: its number and its length
    std::vector<Slot> slots = std::vector<Slot>(1 << 10);
    std::vector<char> names = std::vector<char>(head);
    std::vector<uint64_t> where;

    const Slot& home(uint64_t hash) const { return slots[hash & (slots.size() - 1)]; }
    uint32_t number(uint64_t at) const { return load<uint32_t>(&names[at]); }
    uint32_t length(uint64_t at) const { return load<uint32_t>(&names[at + 4]); }
    const char* name(uint64_t at) const { return &names[at + head]; }

    // The name's number; -1 if it is new and cannot be added.
    int64_t look_up(const char* text, uint64_t n, uint64_t hash) {
        const uint64_t mask = slots.size() - 1;
        uint64_t i = hash & mask;
        for (; slots[i].at; i = (i + 1) & mask) {
            const uint64_t at = slots[i].at;
            if (slots[i].hash == hash && length(at) == n && !std::memcmp(name(at), text, n)) return number(at);
        }
        const uint64_t at = names.size(), id = where.size();
        if (n > UINT32_MAX || id >= UINT32_MAX || !is_utf8(text, n)) return -1;
        const uint32_t before[2] = {(uint32_t)id, (uint32_t)n};
        where.push_back(at);
        names.insert(names.end(), (const char*)before, (const char*)before + head);
        names.insert(names.end(), text, text + n);
        slots[i] = {hash, at};
        if (4 * where.size() > 3 * slots.size()) grow();
        return (int64_t)id;
    }

    void grow() { move_to(2 * slots.size()); }

    // Forget all names but the first `count`.
    void cut(uint64_t count) {
        if (count >= where.size()) return;
        names.resize(where[count]);
        where.resize(count);
        move_to(slots.size());
    }

    void move_to(uint64_t size) {
        std::vector<Slot> moved(size);
        const uint64_t mask = size - 1;
        for (const Slot& slot : slots) {
            if (!slot.at || slot.at >= names.size()) continue;
            uint64_t i = slot.hash & mask;
            while (moved[i].at) i = (i + 1) & mask;
            moved[i] = slot;
        }
        slots.swap(moved);
    }

    // Names one per line in the order of their bytes, which is that of their code points; rank [n]: places by number.
    void sort(char* text, int64_t* rank) const {
        struct Item {
            uint64_t key, at;
        };
        uint64_t shared = where.empty() ? 0 : length(where[0]);  // names often begin alike: compare what follows
        for (const uint64_t at : where) {
            shared = std::min<uint64_t>(shared, length(at));
            const char *a = name(where[0]), *b = name(at);
            shared = std::mismatch(a, a + shared, b).first - a;
        }
        std::vector<Item> items;
        items.reserve(where.size());
        for (const uint64_t at : where) {
            uint8_t first[8] = {};
            std::memcpy(first, name(at) + shared, std::min<uint64_t>(8, length(at) - shared));
            uint64_t key = 0;
            for (const uint8_t byte : first) key = key << 8 | byte;
            items.push_back({key, at});
        }
        std::sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
            if (a.key != b.key) return a.key < b.key;
            const uint32_t n = length(a.at), m = length(b.at);
            const int order = std::memcmp(name(a.at), name(b.at), std::min(n, m));
            return order ? order < 0 : n < m;
        });
        for (uint64_t i = 0; i < items.size(); ++i) {
            const uint64_t at = items[i].at, n = length(at);
            rank[number(at)] = (int64_t)i;
            std::memcpy(text, name(at), n);
            text[n] = '\n';
            text += n + 1;
        }
    }
};

struct Tables {
    Table entities, relations;

    // rows [*, 3] of text[0 … size), whose byte `size` is a line end or NUL.
    int64_t read(const char* text, int64_t size, char separator, int64_t* rows) {
        struct Field {
            const char* text;
            uint64_t length, hash;
        };
        constexpr int batch = 64;  // lines: memory is asked for all their names before the first is waited for
        Field fields[3 * batch];
        bool stops[256] = {};
        for (const char c : {'\0', '\r', '\n', separator}) stops[(uint8_t)c] = true;
        const char *p = text, *end = text + size;
        int64_t row = 0;
        while (p < end) {
            int count = 0;
            while (count < 3 * batch && p < end)
                for (int column = 0; column < 3; ++column) {
                    const char* begin = p;
                    while (!stops[(uint8_t)*p]) ++p;
                    const bool closed = column < 2 ? p < end && *p == separator : p == end || (p < end && *p == '\n');
                    if (!closed || p == begin) return -1;
                    const uint64_t n = p - begin, hash = hash_of(begin, n);
                    fields[count++] = {begin, n, hash};
                    __builtin_prefetch(&table(column).home(hash));
                    ++p;
                }
            for (int i = 0; i < count; ++i) {
                const Table& names = table(i % 3);
                const Table::Slot& slot = names.home(fields[i].hash);
                if (slot.at) __builtin_prefetch(names.names.data() + slot.at);
            }
            for (int i = 0; i < count; ++i) {
                const int64_t id = table(i % 3).look_up(fields[i].text, fields[i].length, fields[i].hash);
                if (id < 0) return -1;
                rows[3 * row + i] = id;
            }
            row += count / 3;
        }
        return row;
    }

    Table& table(int column) { return column == 1 ? relations : entities; }
};

}  // namespace

extern "C" {

Tables* names_new() {
    try {
        return new Tables;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void names_delete(Tables* tables) { delete tables; }

// Lines of text[0 … size), less those that are empty at its end; size becomes that of the lines without the last end.
int64_t names_lines(const char* text, int64_t* size) {
    while (*size && text[*size - 1] == '\n') --*size;
    return *size ? 1 + std::count(text, text + *size, '\n') : 0;
}

int64_t names_read(Tables* tables, const char* text, int64_t size, char separator, int64_t* rows) {
    const uint64_t entities = tables->entities.where.size(), relations = tables->relations.where.size();
    try {
        const int64_t read = tables->read(text, size, separator, rows);
        if (read < 0) {
            tables->entities.cut(entities);
            tables->relations.cut(relations);
        }
        return read;
    } catch (const std::bad_alloc&) {
        return -2;
    }
}

int64_t names_count(Tables* tables, int column) { return (int64_t)tables->table(column).where.size(); }

int64_t names_bytes(Tables* tables, int column) {  // of the names with a line end each
    const Table& table = tables->table(column);
    return (int64_t)(table.names.size() - Table::head - (Table::head - 1) * table.where.size());
}

int64_t names_sort(Tables* tables, int column, char* text, int64_t* rank) {
    try {
        tables->table(column).sort(text, rank);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

void names_renumber(int64_t* rows, int64_t n, const int64_t* entity_rank, const int64_t* relation_rank) {
    for (int64_t i = 0; i < n; ++i, rows += 3) {
        rows[0] = entity_rank[rows[0]];
        rows[1] = relation_rank[rows[1]];
        rows[2] = entity_rank[rows[2]];
    }
}
}
